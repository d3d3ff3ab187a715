//! Streams of whole pictures: each time that something looks different, until it is over.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(200);

/// A picture, and whether it is the last.
pub(super) type Looked<T> = Result<(T, bool), Status>;

/// What `look` finds, and again when it has changed. Ends with the last picture, with a failure, when the caller goes, or
/// with `STOPPING`.
pub(super) fn stream<T: Clone + PartialEq + Send + 'static>(
    look: impl Fn() -> Looked<T> + Send + 'static,
    mut stopped: watch::Receiver<bool>,
) -> ReceiverStream<Result<T, Status>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut told: Option<T> = None;
        loop {
            let (now, is_last) = match look() {
                Ok(looked) => looked,
                Err(refusal) => {
                    let _told = sender.send(Err(refusal)).await;
                    return;
                }
            };
            if told.as_ref() != Some(&now) {
                told = Some(now.clone());
                if sender.send(Ok(now)).await.is_err() || is_last {
                    return;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = sender.closed() => return,
                () = super::until_stopped(&mut stopped) => {
                    let _told = sender.send(Err(super::stopping().into())).await;
                    return;
                }
            }
        }
    });
    ReceiverStream::new(receiver)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use futures_util::StreamExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_change_is_told_once_and_the_last_ends_it() {
        let looks = Arc::new(AtomicU32::new(0));
        let look = {
            let looks = looks.clone();
            // 0 0 0 1 1 1 2 …
            move || {
                let now = looks.fetch_add(1, Ordering::SeqCst) / 3;
                Ok((now, now == 2))
            }
        };
        let (_stop, stopped) = watch::channel(false);
        let told: Vec<u32> = stream(look, stopped).filter_map(|told| async { told.ok() }).collect().await;
        assert_eq!(told, [0, 1, 2]);
        assert_eq!(looks.load(Ordering::SeqCst), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_and_a_refusal_end_it() {
        let (stop, stopped) = watch::channel(false);
        let mut endless = stream(|| Ok((1, false)), stopped.clone());
        assert!(matches!(endless.next().await, Some(Ok(1))));
        stop.send_replace(true);
        assert!(
            matches!(endless.next().await, Some(Err(status)) if status.code() == tonic::Code::Unavailable)
        );
        assert!(endless.next().await.is_none());
        let mut refused = stream(|| Looked::<u32>::Err(Status::not_found("gone")), stopped);
        assert!(matches!(refused.next().await, Some(Err(status)) if status.code() == tonic::Code::NotFound));
        assert!(refused.next().await.is_none());
    }
}
