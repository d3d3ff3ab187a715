//! What goes wrong around the launchers: services die or stand still, images go.

use std::time::Duration;

use crate::{Outcome, dice::Dice, launcher::IMAGES, shell::sh, tally::Tally};

#[derive(Clone, Copy)]
enum Trouble {
    KillCowshed,
    KillContainerd,
    StopContainerd,
    RemoveImage,
}

/// Some trouble again and again.
pub(crate) struct Troubles {
    dice: Dice,
    /// Acquires from one to the next, half to one and a half times as many.
    every: usize,
    kinds: &'static [Trouble],
}

impl Troubles {
    pub(crate) fn all(seed: u64, every: usize) -> Self {
        use Trouble::*;
        Self {
            dice: Dice((seed + 1) * 0x5851_f42d),
            every,
            kinds: &[KillCowshed, KillContainerd, StopContainerd, RemoveImage],
        }
    }

    pub(crate) fn without_kills_of_cowshed(seed: u64, every: usize) -> Self {
        use Trouble::*;
        Self {
            dice: Dice((seed + 1) * 0x1405_7b7e),
            every,
            kinds: &[KillContainerd, StopContainerd, RemoveImage],
        }
    }

    pub(crate) async fn run(&mut self, tally: &Tally) -> Outcome {
        loop {
            let next = tally.acquires() + (self.every / 2 + self.dice.below(self.every.max(1))) as u64;
            while tally.acquires() < next {
                if tally.is_done() {
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let trouble = self.kinds[self.dice.below(self.kinds.len())];
            self.make(trouble, tally).await?;
        }
    }

    async fn make(&mut self, trouble: Trouble, tally: &Tally) -> Outcome {
        match trouble {
            Trouble::KillCowshed => {
                tally.count("kills of cowshed");
                sh("cowshed-host kill cowshed").await?;
            }
            Trouble::KillContainerd => {
                tally.count("kills of containerd");
                sh("cowshed-host kill containerd").await?;
            }
            Trouble::StopContainerd => {
                tally.count("stops of containerd");
                sh("cowshed-host pause containerd").await?;
                tokio::time::sleep(Duration::from_millis(1000 + self.dice.below(5000) as u64)).await;
                sh("cowshed-host continue containerd").await?;
            }
            Trouble::RemoveImage => {
                tally.count("images removed");
                let sync = if self.dice.below(2) == 0 { "--sync" } else { "" };
                let image = IMAGES[self.dice.below(IMAGES.len())];
                // It may be gone, or containerd not back yet.
                let _removed = sh(&format!("ctr images rm {sync} {image}")).await;
            }
        }
        Ok(())
    }
}
