//! One lease: its states and legal moves.
//!
//! ```text
//!            intent written         device verified            released
//!   (none) ────────────────► Preparing ────────► Granted ─────────────────► Releasing ───► (gone)
//!                             │     │           ▲       │                   ▲   ▲   device closed and
//!                      failed │     │   renewed │       │ expired, or of    │   │   snapshot removed
//!                             │     │  acquired │       ▼ an earlier boot   │   │
//!                             │     │    again  └──── Suspect ──────────────┘   │
//!                             │     │                    released, or its grace │
//!                             │     │                    is over and its device │
//!                             │     │                    is closed              │
//!                             │     └─── released while it was made ────────────┘
//!                             ▼
//!                          Failed ── remains cleared away ──► Failed ── seen ──► (gone)
//! ```
//!
//! Nothing comes back from Releasing or Failed: a VM that asks again gets a new lease, of a new generation. A lease that
//! is Preparing, Granted or Suspect is the one that its VM holds; there is one at the most.
//!
//! What VMs share has a lease of its own, in the name of the image: it is there as long as another lease shares it, and is
//! then released. It neither expires nor becomes Suspect, and what cannot be made of it is released at once.
//!
//! Deadlines are those of the host's own clock ([`Uptime`]), which does not jump; each is of one boot. A lease that was
//! acquired or renewed in an earlier boot is Suspect: no VM of that boot is alive, but what is on its disk may be wanted.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    BootId, DeviceIdentity, Generation, LeaseId, Moment, Revision, Tenant, Ttl, UnixMicros, Uptime, VmId,
};

/// What a VM asked for, in full form, so that equal wishes compare equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Image reference with registry and tag or digest.
    pub image: String,
    /// os/architecture[/variant].
    pub platform: String,
    /// Whose VM it is.
    #[serde(default)]
    pub tenant: Tenant,
    /// What the VM may do with the image's disk.
    #[serde(default)]
    pub mode: Mode,
    /// An empty disk of its own, beside a shared one.
    #[serde(default)]
    pub scratch: Option<Scratch>,
}

/// What a VM may do with its image's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// It has a writable snapshot of its own.
    #[default]
    CopyOnWrite,
    /// It reads the one device that all such VMs of the image have.
    SharedReadOnly,
}

impl Mode {
    /// As it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::CopyOnWrite => "copy-on-write",
            Self::SharedReadOnly => "shared-read-only",
        }
    }
}

/// An empty disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Scratch {
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Whether it has no filesystem.
    pub raw: bool,
}

impl fmt::Display for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, {}", self.size_bytes, if self.raw { "raw" } else { "formatted" })
    }
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
    /// The VM's own disk beside it, if it asked for one.
    #[serde(default)]
    pub scratch: Option<ScratchGrant>,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// How to start what is in it.
    pub process: Process,
    /// When.
    pub at: UnixMicros,
}

/// An empty disk that a launcher is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScratchGrant {
    /// The device.
    pub device: DeviceIdentity,
    /// The filesystem on it, by mount(8)'s name; empty if it is raw.
    pub filesystem: String,
}

/// How long a lease holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// As the launcher asked; `None`: until it is released.
    pub ttl: Option<Ttl>,
    /// The boot in which it was acquired or renewed last.
    pub boot: BootId,
    /// When it ends, in that boot; `None` if it has no end, or is not granted yet.
    pub until: Option<Uptime>,
}

/// Why it is not sure that a lease is still wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Suspicion {
    /// Its time is over, and nobody has renewed it.
    Expired,
    /// The host was booted since it was acquired or renewed.
    EarlierBoot,
}

/// Why a lease has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The stable name that the caller's error had.
    pub reason: String,
    /// Its words.
    pub message: String,
}

/// Where a lease stands. See the module's picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Being made. There may be a snapshot already.
    Preparing,
    /// Held by the VM.
    Granted(Box<Grant>),
    /// Held by the VM, if that is still there.
    Suspect {
        /// What was granted.
        grant: Box<Grant>,
        /// Why.
        why: Suspicion,
        /// Since when.
        since: UnixMicros,
        /// The boot that `until` is of.
        boot: BootId,
        /// When its grace is over.
        until: Uptime,
    },
    /// To be reclaimed: given back, or never finished.
    Releasing {
        /// What had been granted; `None` if nothing was.
        grant: Option<Box<Grant>>,
        /// Since when.
        since: UnixMicros,
        /// Whether an operator has given it up for its launcher.
        #[serde(default)]
        abandoned: bool,
    },
    /// Could not be made. Kept until somebody has seen why.
    Failed {
        /// Why.
        failure: Failure,
        /// Since when.
        since: UnixMicros,
        /// Whether nothing is left of it but this record.
        cleared: bool,
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
    /// How long it holds.
    pub term: Term,
    /// Of its last change.
    pub revision: Revision,
    /// The lease, in the name of its image, whose device it shares.
    #[serde(default)]
    pub shares: Option<LeaseId>,
    /// What its VM was expected to write when it was acquired, in bytes. 0 of those of versions that did not expect anything.
    #[serde(default)]
    pub expects: u64,
    /// Where it stands.
    pub state: State,
}

impl Lease {
    /// What was granted, also if it has been released since.
    pub fn grant(&self) -> Option<&Grant> {
        match &self.state {
            State::Preparing | State::Failed { .. } => None,
            State::Granted(grant) | State::Suspect { grant, .. } => Some(grant),
            State::Releasing { grant, .. } => grant.as_deref(),
        }
    }

    /// The device that is nobody else's, and that goes with the lease.
    pub fn own_device(&self) -> Option<&DeviceIdentity> {
        let grant = self.grant()?;
        match self.shares {
            Some(_) => grant.scratch.as_ref().map(|scratch| &scratch.device),
            None => Some(&grant.device),
        }
    }

    /// The lease whose snapshot its VM boots from.
    pub fn root(&self) -> &LeaseId {
        self.shares.as_ref().unwrap_or(&self.id)
    }

    /// Whether its VM has it, or is to have it.
    pub fn is_held(&self) -> bool {
        matches!(self.state, State::Preparing | State::Granted(_) | State::Suspect { .. })
    }

    /// Whether it is a spare that is there, and nobody's.
    pub fn is_spare(&self) -> bool {
        self.vm.is_spare() && matches!(self.state, State::Granted(_))
    }

    /// Whether it can be handed out: a spare that was looked at in this boot.
    pub fn is_ready_spare(&self, now: &Moment) -> bool {
        self.is_spare() && self.term.boot == now.boot
    }

    /// Whether what there is of it is to be cleared away.
    pub fn is_to_be_reclaimed(&self) -> bool {
        matches!(self.state, State::Releasing { .. } | State::Failed { cleared: false, .. })
    }

    /// Why it is not sure, now, that it is still wanted; `None` if it is, or nothing was granted.
    pub fn suspicion(&self, now: &Moment) -> Option<Suspicion> {
        match &self.state {
            State::Suspect { why, .. } => Some(*why),
            // It is wanted as long as somebody shares it, or until it is handed out.
            State::Granted(_) if !self.vm.is_vm() => None,
            State::Granted(_) if self.term.boot != now.boot => Some(Suspicion::EarlierBoot),
            State::Granted(_) => self.term.until.filter(|until| *until <= now.up).map(|_| Suspicion::Expired),
            State::Preparing | State::Releasing { .. } | State::Failed { .. } => None,
        }
    }

    /// Whether it is Suspect and its grace is over.
    pub fn is_overdue(&self, now: &Moment) -> bool {
        matches!(&self.state, State::Suspect { boot, until, .. } if *boot == now.boot && *until <= now.up)
    }
}
