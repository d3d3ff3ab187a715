//! containerd's events: that something about images has changed.

use std::{sync::Arc, time::Duration};

use containerd_client::services::v1::{SubscribeRequest, events_client::EventsClient};
use prost::Message as _;
use tokio::{sync::Notify, task::JoinHandle};

use super::Containerd;

/// A subscription that broke off is made again after this pause.
const RETRY: Duration = Duration::from_secs(2);

/// Tells that an image may have changed, until it is dropped.
pub struct ImageEvents {
    news: Arc<Notify>,
    task: JoinHandle<()>,
}

impl ImageEvents {
    /// Returns when an image was made, changed or removed, or may have been: a subscription that broke off has missed what
    /// happened meanwhile. One that happens just when this begins can be missed as well, for containerd does not say when it
    /// has begun to tell.
    pub async fn next(&self) {
        self.news.notified().await;
    }
}

impl Drop for ImageEvents {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Containerd {
    /// Subscribes to what happens to images of our namespace, again and again.
    pub fn image_events(&self) -> ImageEvents {
        let news = Arc::new(Notify::new());
        let told = news.clone();
        let task = tokio::spawn(self.clone().follow_images(move |_| told.notify_one()));
        ImageEvents { news, task }
    }

    /// Tells the names of images of our namespace that were made, changed or removed, for ever; `None`: of any, for a
    /// subscription broke off, or an event cannot be read.
    pub async fn follow_images(self, tell: impl Fn(Option<&str>)) {
        loop {
            self.follow(&tell).await;
            // What happens until the next one has begun is told by its beginning.
            tell(None);
            tokio::time::sleep(RETRY).await;
            tell(None);
        }
    }

    /// Returns when containerd's process has ended, or cannot be reached.
    pub async fn ended(&self) {
        // Of nothing: the answer never begins, and ends with the connection.
        let filter = format!("namespace=={},topic==\"/cowshed/nothing\"", self.namespace);
        let mut client = EventsClient::new(self.channel.clone());
        if let Ok(events) = client.subscribe(SubscribeRequest { filters: vec![filter] }).await {
            let mut events = events.into_inner();
            while let Ok(Some(_)) = events.message().await {}
        }
    }

    /// Until the subscription breaks off. No deadline: containerd answers with its first event, and that may be never.
    async fn follow(&self, tell: &impl Fn(Option<&str>)) {
        let filter = format!("namespace=={},topic~=\"^/images/\"", self.namespace);
        let mut client = EventsClient::new(self.channel.clone());
        let subscribed = client.subscribe(SubscribeRequest { filters: vec![filter] }).await;
        let Ok(events) = subscribed else { return };
        let mut events = events.into_inner();
        while let Ok(Some(event)) = events.message().await {
            let about = event.event.and_then(|event| About::decode(event.value.as_slice()).ok());
            tell(about.as_ref().map(|about| about.name.as_str()).filter(|name| !name.is_empty()));
        }
    }
}

/// What containerd's events ImageCreate, ImageUpdate and ImageDelete begin with.
#[derive(Clone, PartialEq, prost::Message)]
struct About {
    #[prost(string, tag = "1")]
    name: String,
}
