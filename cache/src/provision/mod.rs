//! The pool itself, which an operator makes, extends, looks at, checks and repairs, whether or not the service runs.
//!
//! `fitness` decides over values whether a pool can be Cowshed's and what is wrong with how it behaves; `facts` asks the kernel
//! and LVM2; `create` and `repair` have the order of what is done; `grow` is what the service extends its pool with.

pub mod create;
pub mod facts;
pub mod fitness;
pub mod grow;
pub mod repair;

use std::{fmt, time::Duration};

use cowshed_pool::{device::behaviour, device::stack::Stack, lvm::LvmError};

use crate::exit;

/// Why a command for the pool has not done what it was to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// A sentence without a full stop: what is wrong with which thing, and the way out.
    pub message: String,
    /// The exit status.
    pub status: u8,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

impl Refusal {
    /// Something is not as it has to be.
    pub(crate) fn unfit(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: exit::UNFIT }
    }

    /// The system has said no.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: exit::FAILURE }
    }
}

impl From<LvmError> for Refusal {
    fn from(error: LvmError) -> Self {
        let status = match &error {
            LvmError::NoRoom { .. } => exit::FULL,
            LvmError::Locked { .. } | LvmError::Killed { .. } => exit::AGAIN,
            LvmError::TimedOut { .. } => exit::LATE,
            LvmError::Unfit(_) => exit::UNFIT,
            LvmError::NotThere(_)
            | LvmError::Failed { .. }
            | LvmError::Unreadable { .. }
            | LvmError::Kernel(_) => exit::FAILURE,
        };
        Self { message: error.to_string(), status }
    }
}

impl From<cowshed_pool::device::DeviceError> for Refusal {
    fn from(error: cowshed_pool::device::DeviceError) -> Self {
        Self::failed(error.to_string())
    }
}

/// What commands for the pool return.
pub type Result<T, E = Refusal> = std::result::Result<T, E>;

/// Pause before a pool that is not there yet is looked at again …
const RETRY: Duration = Duration::from_secs(10);
/// … and one that is: it may be activated anew, changed, or its module loaded anew.
const AGAIN: Duration = Duration::from_secs(60);

/// Sees to it, while the service runs, that whoever writes to a full pool waits for room and gets no error, as far as that
/// can be had; warns of the rest, once. `name` is a device-mapper name; "" means the only pool there is.
pub async fn see_to_waiting(name: String) {
    let mut told = Vec::new();
    loop {
        let wanted = name.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let stack = Stack::new()?;
            let name = if wanted.is_empty() { stack.pools()?.into_iter().next() } else { Some(wanted) };
            name.map_or(Ok(None), |name| stack.pool(&name))
        });
        let Ok(Ok(Some(active))) = looked.await else {
            tokio::time::sleep(RETRY).await;
            continue;
        };
        if behaviour::no_space_timeout().is_ok_and(|seconds| seconds > 0)
            && behaviour::wait_without_end().is_ok()
        {
            tracing::info!("no_space_timeout of dm_thin_pool is 0 now: writes to a full pool wait for room");
        }
        let timeout = behaviour::no_space_timeout().ok();
        let warnings = fitness::of_behaviour(&active.usage.name, active.behaviour, timeout);
        for warning in warnings.iter().filter(|warning| !told.contains(*warning)) {
            tracing::warn!(pool = %active.usage.name, "{warning}");
        }
        told = warnings;
        tokio::time::sleep(AGAIN).await;
    }
}
