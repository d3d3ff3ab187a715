//! One lease: its states and legal moves.
//!
//! ```text
//!            intent written         device verified            released
//!   (none) ────────────────► Preparing ────────► Granted ─────────────────► Releasing ───► (gone)
//!                                │                                              ▲  device closed and
//!                                └── failed, or found half made at start-up ────┘  snapshot removed
//! ```
//!
//! There is no way back: a VM whose lease is Releasing gets a new lease, of a new generation, if it asks again.

use serde::{Deserialize, Serialize};

use crate::{DeviceIdentity, Generation, LeaseId, VmId};

/// Microseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UnixMicros(pub i64);

/// What a VM asked for, in full form, so that equal wishes compare equal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Image reference with registry and tag or digest.
    pub image: String,
    /// os/architecture[/variant].
    pub platform: String,
}

/// How an image wants its process started; the fields of an OCI image configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as in the OCI image specification")]
pub struct Process {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    pub working_dir: String,
}

/// What a launcher is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The device.
    pub device: DeviceIdentity,
    /// The filesystem on it, by mount(8)'s name.
    pub filesystem: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// How to start what is in it.
    pub process: Process,
    /// When.
    pub at: UnixMicros,
}

/// Where a lease stands. See the module's picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Being made. There may be a snapshot already.
    Preparing,
    /// Held by the VM.
    Granted(Box<Grant>),
    /// To be reclaimed: given back, or never finished.
    Releasing {
        /// What had been granted; `None` if nothing was.
        grant: Option<Box<Grant>>,
        /// Since when.
        since: UnixMicros,
    },
}

/// A disk for a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// This lease.
    pub id: LeaseId,
    /// Whose.
    pub vm: VmId,
    /// Orders all leases of this host.
    pub generation: Generation,
    /// As asked.
    pub spec: Spec,
    /// When it was asked for.
    pub created_at: UnixMicros,
    /// Where it stands.
    pub state: State,
}

impl Lease {
    /// What was granted, also if it has been released since.
    pub fn grant(&self) -> Option<&Grant> {
        match &self.state {
            State::Preparing => None,
            State::Granted(grant) => Some(grant),
            State::Releasing { grant, .. } => grant.as_deref(),
        }
    }
}
