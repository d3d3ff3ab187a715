//! What an endpoint sends: read whole up to a bound, or as it comes.

use std::io;

use futures_util::{StreamExt as _, stream, stream::BoxStream};
use reqwest::Response;

use super::refusal::{Failure, words};

/// All of it, if it has `limit` bytes at the most.
pub(super) async fn whole(mut response: Response, limit: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    while let Some(part) = response.chunk().await? {
        if bytes.len() + part.len() > limit {
            return Err(Failure::TooLarge(limit));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

/// The first `limit` bytes, or as many as come.
pub(super) async fn beginning(mut response: Response, limit: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < limit {
        let Ok(Some(part)) = response.chunk().await else { break };
        bytes.extend_from_slice(&part[..part.len().min(limit - bytes.len())]);
    }
    bytes
}

/// Bytes as they arrive.
pub(super) type Parts = BoxStream<'static, io::Result<Vec<u8>>>;

/// The bytes as they arrive.
pub(super) fn parts(response: Response) -> Parts {
    let next = |mut response: Response| async move {
        let part = response.chunk().await.map_err(|error| io::Error::other(words(&error)));
        part.map(|part| part.map(|bytes| (bytes.to_vec(), response)))
    };
    stream::try_unfold(response, next).boxed()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn response(text: &'static str) -> Response {
        Response::from(axum::http::Response::new(text))
    }

    #[tokio::test]
    async fn bounds() {
        for (limit, fits) in [(5, true), (6, true), (4, false), (0, false)] {
            let read = whole(response("12345"), limit).await;
            assert_eq!(read.is_ok(), fits, "{limit}");
            assert!(fits || matches!(read, Err(Failure::TooLarge(_))), "{limit}");
        }
        for (limit, text) in [(5, "12345"), (9, "12345"), (3, "123"), (0, "")] {
            assert_eq!(beginning(response("12345"), limit).await, text.as_bytes(), "{limit}");
        }
    }
}
