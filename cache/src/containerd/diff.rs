//! containerd's differ: applies a layer to a snapshot.

use std::time::Duration;

use containerd_client::{
    services::v1::{ApplyRequest, diff_client::DiffClient},
    types::{Descriptor, Mount},
};

use super::{CallError, Containerd, call::within};

impl Containerd {
    /// Inflates the layer `diff` and applies it to what `mounts` mount, within `limit`. Returns the digest of the
    /// uncompressed layer.
    pub async fn apply(
        &self,
        diff: Descriptor,
        mounts: Vec<Mount>,
        limit: Duration,
    ) -> Result<String, CallError> {
        let mut client = DiffClient::new(self.channel.clone());
        let request = self.request(ApplyRequest { diff: Some(diff), mounts, ..Default::default() });
        let reply = within("Diff.Apply", limit, client.apply(request)).await?;
        Ok(reply.applied.map(|applied| applied.digest).unwrap_or_default())
    }
}
