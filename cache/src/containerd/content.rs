//! containerd's content store: blobs by digest, written in pieces, verified when they are committed.

use std::collections::HashMap;

use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, ListContentRequest, ReadContentRequest, ReadContentResponse,
    UpdateRequest, WriteAction, WriteContentRequest, WriteContentResponse, content_client::ContentClient,
};
use prost_types::FieldMask;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming, transport::Channel};

use super::{CallError, Containerd};

const WRITE: &str = "Content.Write";

impl Containerd {
    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(super::MAX_MESSAGE_BYTES)
    }

    /// Size in bytes and labels of a blob, if it is there.
    pub async fn blob(&self, digest: &str) -> Result<Option<(u64, HashMap<String, String>)>, CallError> {
        let request = self.request(InfoRequest { digest: digest.to_owned() });
        match self.call("Content.Info", self.content().info(request)).await {
            Ok(reply) => Ok(reply.info.map(|info| (info.size.unsigned_abs(), info.labels))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The labels of all blobs, by digest.
    pub async fn blobs(&self) -> Result<HashMap<String, HashMap<String, String>>, CallError> {
        const LIST: &str = "Content.List";
        let request = self.request(ListContentRequest::default());
        let mut pages = self.call(LIST, self.content().list(request)).await?;
        let mut blobs = HashMap::new();
        loop {
            let next = async { pages.message().await.map(Response::new) };
            let Some(page) = self.call(LIST, next).await? else { return Ok(blobs) };
            blobs.extend(page.info.into_iter().map(|info| (info.digest, info.labels)));
        }
    }

    /// A blob of at most `limit` bytes, whole. `None` if it is not there, or larger.
    pub async fn read_blob(&self, digest: &str, limit: usize) -> Result<Option<Vec<u8>>, CallError> {
        let request = self.request(ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 });
        let mut stream = match self.call("Content.Read", self.content().read(request)).await {
            Ok(stream) => stream,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        loop {
            let next = async { stream.message().await.map(Response::new) };
            match self.call("Content.Read", next).await {
                Ok(Some(part)) => bytes.extend_from_slice(&part.data),
                Ok(None) => return Ok(Some(bytes)),
                Err(error) if error.is_not_found() => return Ok(None),
                Err(error) => return Err(error),
            }
            if bytes.len() > limit {
                return Ok(None);
            }
        }
    }

    /// A blob from `offset` on, piece by piece.
    pub async fn open_blob(&self, digest: &str, offset: u64) -> Result<ContentReader, CallError> {
        let offset = i64::try_from(offset).unwrap_or(i64::MAX);
        let request = self.request(ReadContentRequest { digest: digest.to_owned(), offset, size: 0 });
        let pieces = self.call("Content.Read", self.content().read(request)).await?;
        Ok(ContentReader { containerd: self.clone(), pieces })
    }

    /// Adds labels to a blob that is there.
    pub async fn label_blob(&self, digest: &str, labels: HashMap<String, String>) -> Result<(), CallError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_owned(), labels, ..Default::default() };
        let request =
            self.request(UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) });
        self.call("Content.Update", self.content().update(request)).await.map(drop)
    }

    /// Begins, or goes on with, the blob that is written under the name `reference`, held by `lease`.
    ///
    /// # Errors
    /// [`CallError::is_already_exists`] if the blob is there.
    pub async fn write_blob(
        &self,
        lease: &str,
        reference: String,
        digest: String,
        size: u64,
    ) -> Result<ContentWriter, CallError> {
        let (sender, receiver) = mpsc::channel(2);
        let total = i64::try_from(size).unwrap_or(i64::MAX);
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.clone(),
            total,
            expected: digest.clone(),
            ..Default::default()
        };
        // The channel has room for it.
        let _sent = sender.send(first).await;
        let request = self.leased(lease, ReceiverStream::new(receiver));
        let mut content = self.content();
        let replies = self.call(WRITE, content.write(request)).await?;
        let mut writer =
            ContentWriter { containerd: self.clone(), sender, replies, reference, digest, total, offset: 0 };
        writer.offset = writer.reply().await?.offset.unsigned_abs();
        Ok(writer)
    }

    /// Gives up the unfinished blob `reference`. Succeeds if there is none.
    pub async fn abort_write(&self, reference: &str) -> Result<(), CallError> {
        let request = self.request(AbortRequest { r#ref: reference.to_owned() });
        match self.call("Content.Abort", self.content().abort(request)).await {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// A blob that is read.
#[derive(Debug)]
pub struct ContentReader {
    containerd: Containerd,
    pieces: Streaming<ReadContentResponse>,
}

impl ContentReader {
    /// The next piece; empty at the end.
    pub async fn next(&mut self) -> Result<Vec<u8>, CallError> {
        let pieces = &mut self.pieces;
        let next = async { pieces.message().await.map(Response::new) };
        let piece = self.containerd.call("Content.Read", next).await?;
        Ok(piece.map(|piece| piece.data).unwrap_or_default())
    }
}

/// A blob in the making. Dropping it leaves what was written, to go on with.
#[derive(Debug)]
pub struct ContentWriter {
    containerd: Containerd,
    sender: mpsc::Sender<WriteContentRequest>,
    replies: Streaming<WriteContentResponse>,
    reference: String,
    digest: String,
    total: i64,
    offset: u64,
}

impl ContentWriter {
    /// How many bytes are written.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Starts anew: the next bytes are the first.
    pub fn restart(&mut self) {
        // containerd truncates at the first write at offset 0.
        self.offset = 0;
    }

    /// Appends `data`, and waits until containerd has it.
    pub async fn write(&mut self, data: Vec<u8>) -> Result<(), CallError> {
        let message = self.message(WriteAction::Write, data, HashMap::new());
        self.exchange(message).await.map(|reply| self.offset = reply.offset.unsigned_abs())
    }

    /// Appends `rest` and makes it a blob, if its digest and size are right.
    ///
    /// # Errors
    /// [`CallError::is_already_exists`] if the blob is there by now; it need not be held by the lease then, nor labelled.
    pub async fn commit(mut self, rest: Vec<u8>, labels: HashMap<String, String>) -> Result<(), CallError> {
        let message = self.message(WriteAction::Commit, rest, labels);
        self.exchange(message).await.map(drop)
    }

    fn message(
        &self,
        action: WriteAction,
        data: Vec<u8>,
        labels: HashMap<String, String>,
    ) -> WriteContentRequest {
        WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            total: self.total,
            expected: self.digest.clone(),
            offset: i64::try_from(self.offset).unwrap_or(i64::MAX),
            data,
            labels,
        }
    }

    async fn exchange(&mut self, message: WriteContentRequest) -> Result<WriteContentResponse, CallError> {
        // If the stream is gone, the reply says why.
        let _sent = self.sender.send(message).await;
        self.reply().await
    }

    async fn reply(&mut self) -> Result<WriteContentResponse, CallError> {
        let replies = &mut self.replies;
        let next = async {
            let reply = replies.message().await?;
            reply.map(Response::new).ok_or_else(|| Status::unavailable("the stream ended"))
        };
        self.containerd.call(WRITE, next).await
    }
}
