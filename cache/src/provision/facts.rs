//! What kernel and LVM2 say of a pool, for people and programs. LVM2 may be gone, or locked: the kernel's part is told all the same.

use cowshed_pool::{
    device::{
        behaviour,
        stack::{ActivePool, ActiveThin, Stack},
    },
    lvm::{self, Room, Runner},
};

use super::{Refusal, Result, fitness};

/// A pool.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its device-mapper name.
    pub name: String,
    /// As the kernel has it; `None` if it is not active.
    pub active: Option<ActivePool>,
    /// Its active disks.
    pub thins: Vec<ActiveThin>,
    /// As LVM2 has it, or why that is not known.
    pub room: Result<Room>,
    /// The module's patience with full pools, in seconds.
    pub timeout: Option<u64>,
    /// When dmeventd would extend it, in percent; 100 is never.
    pub threshold: Option<u64>,
}

impl Facts {
    /// What should be otherwise, each with the way out.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = match (&self.active, &self.room) {
            (None, Ok(Room { pool, .. })) => {
                vec![format!("the thin pool {} is not active: lvchange -ay {}", self.name, pool.path())]
            }
            (None, Err(_)) => vec![format!("the thin pool {} is not active", self.name)],
            (Some(active), _) if active.suspended => {
                vec![format!(
                    "the thin pool {} stands still: somebody works on it, or has been killed in that",
                    self.name
                )]
            }
            _ => Vec::new(),
        };
        match &self.room {
            Ok(room) => {
                let unfit = fitness::unfit(&room.group, &room.pool, self.active.as_ref(), &self.thins);
                warnings.extend(unfit.into_iter().map(|what| format!("{}: {what}", self.name)));
                warnings.extend(fitness::of_group(room, self.threshold));
            }
            Err(refusal) => warnings.push(refusal.message.clone()),
        }
        let behaviour = self.active.as_ref().and_then(|active| active.behaviour);
        for warning in fitness::of_behaviour(&self.name, behaviour, self.timeout) {
            // Told already by what LVM2 has written down.
            if !(warning.contains("errorwhenfull") && warnings.iter().any(|w| w.contains("errorwhenfull"))) {
                warnings.push(warning);
            }
        }
        warnings
    }
}

/// Asks for everything.
pub async fn of(runner: &Runner, name: &str) -> Result<Facts> {
    let asked = name.to_owned();
    let (active, thins) = on_stack(move |stack| {
        let active = stack.pool(&asked)?;
        let thins = active.as_ref().map_or(Ok(Vec::new()), |active| stack.thins(&active.usage.name))?;
        Ok((active, thins))
    })
    .await?;
    let room = lvm::room(runner, name).await.map_err(Refusal::from);
    let threshold = if room.is_ok() { threshold(runner).await } else { None };
    let timeout = behaviour::no_space_timeout().ok();
    Ok(Facts { name: name.to_owned(), active, thins, room, timeout, threshold })
}

async fn threshold(runner: &Runner) -> Option<u64> {
    let words = ["lvmconfig", "--type", "full", "activation/thin_pool_autoextend_threshold"];
    let said = runner.run(&words).await.ok()?;
    said.trim().rsplit('=').next()?.trim().parse().ok()
}

/// The device-mapper name of the pool that is meant by `named` ("vg-pool" or "vg/pool"), else by the configuration, else by there
/// being only one.
pub async fn resolve(runner: &Runner, named: Option<&str>, configured: &str) -> Result<String> {
    let text = named.unwrap_or(configured);
    if let Some((group, volume)) =
        text.trim_start_matches("/dev/").split_once('/').filter(|(g, _)| *g != "mapper")
    {
        return Ok(lvm::dm_name(group, volume));
    }
    if !text.is_empty() {
        return Ok(text.trim_start_matches("/dev/mapper/").to_owned());
    }
    let mut pools = on_stack(|stack| stack.pools()).await?;
    if pools.is_empty() {
        pools = lvm::pools(runner).await?.iter().map(lvm::PoolVolume::dm_name).collect();
    }
    match &pools[..] {
        [one] => Ok(one.clone()),
        [] => Err(Refusal::unfit("this host has no thin pool: cowshed pool create makes one")),
        many => Err(Refusal::unfit(format!(
            "this host has {} thin pools ({}): name the one that is meant, here or in [pool] name",
            many.len(),
            many.join(", ")
        ))),
    }
}

/// Asks device-mapper, away from the runtime's threads.
pub(super) async fn on_stack<T: Send + 'static>(
    work: impl FnOnce(&Stack) -> Result<T, cowshed_pool::device::DeviceError> + Send + 'static,
) -> Result<T> {
    let asked = tokio::task::spawn_blocking(move || work(&Stack::new()?)).await;
    Ok(asked.map_err(|e| Refusal::failed(e.to_string()))??)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernel::PoolMode,
        provision::fitness::tests::{active, room},
    };

    #[test]
    fn a_pool_in_order_has_no_warnings() {
        let mut facts = Facts {
            name: "vg-pool".to_owned(),
            active: Some(active(PoolMode::ReadWrite)),
            thins: Vec::new(),
            room: Ok(room()),
            timeout: Some(0),
            threshold: Some(100),
        };
        assert_eq!(facts.warnings(), Vec::<String>::new());
        facts.active = None;
        assert!(facts.warnings()[0].contains("lvchange -ay vg/pool"));
        facts.room = Err(Refusal::failed("LVM2 is locked"));
        assert!(facts.warnings().contains(&"LVM2 is locked".to_owned()));
    }

    #[tokio::test]
    async fn pools_are_named_as_lvm_or_device_mapper_names_them() {
        let runner = Runner::default();
        for (named, configured, name) in [
            (Some("vg/pool"), "other", "vg-pool"),
            (Some("my-vg/pool"), "", "my--vg-pool"),
            (Some("/dev/vg/pool"), "", "vg-pool"),
            (Some("/dev/mapper/vg-pool"), "", "vg-pool"),
            (None, "vg-pool", "vg-pool"),
        ] {
            assert_eq!(resolve(&runner, named, configured).await.as_deref(), Ok(name), "{named:?}");
        }
    }
}
