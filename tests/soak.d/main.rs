//! The soak: very many acquires and releases, with all that goes wrong in between, and then everything has to be back where
//! it was: the pool, thin ids, leases, snapshots, cowshed's file descriptors and its memory.
//!
//!     warm-up → figures → troubles of all kinds → figures → warm-up → figures → troubles, but cowshed lives → figures
//!
//! Figures are taken with nothing held and no image there. The last two are of one process of cowshed.

#[path = "../support/cowshed.rs"]
mod cowshed;
#[path = "../support/dice.rs"]
mod dice;
mod figures;
mod launcher;
mod shell;
mod tally;
mod trouble;

use std::{
    io::Write as _,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use figures::Figures;
use launcher::Launcher;
use tally::Tally;
use trouble::Troubles;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Soaks, in the test host.
#[derive(Parser)]
struct Arguments {
    /// New leases, besides those of the warm-ups.
    #[arg(long, default_value_t = 10_000)]
    acquires: u64,
    /// VMs.
    #[arg(long, default_value_t = 50)]
    vms: usize,
    /// Makes the order of everything another one.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Acquires from one trouble to the next, in the mean.
    #[arg(long, default_value_t = 80)]
    troubles_every: usize,
}

const CLIENTS: usize = 8;
/// Of the acquires, how many have cowshed killed among their troubles, in percent.
const KILLED_PERCENT: u64 = 40;

struct Soak {
    arguments: Arguments,
    began: Instant,
    tally: Arc<Tally>,
}

impl Soak {
    /// Acquires and releases until there were so many new leases more.
    async fn go_on(&self, acquires: u64, part: u64, mut troubles: Option<Troubles>) -> Outcome {
        self.tally.go_on_for(acquires);
        let vms: Vec<String> = (0..self.arguments.vms).map(|n| format!("soak-{n}")).collect();
        let mut clients = Vec::new();
        for n in 0..CLIENTS {
            let mine = vms.iter().skip(n).step_by(CLIENTS).cloned().collect();
            let seed = (self.arguments.seed + 1) * 0x9e37_79b9 + part * 1000 + n as u64;
            let launcher = Launcher::new(mine, seed, troubles.is_some(), self.tally.clone()).await?;
            clients.push(tokio::spawn(launcher.run()));
        }
        let tally = self.tally.clone();
        let troubled = tokio::spawn(async move {
            match &mut troubles {
                Some(troubles) => troubles.run(&tally).await,
                None => Ok(()),
            }
        });
        let mut told = Instant::now();
        while !clients.iter().all(tokio::task::JoinHandle::is_finished) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            if told.elapsed() > Duration::from_secs(60) {
                told = Instant::now();
                self.say(&self.tally.to_string())?;
            }
        }
        for client in clients {
            client.await?;
        }
        troubled.await?
    }

    fn say(&self, what: &str) -> Outcome {
        Ok(writeln!(std::io::stdout(), "{:>6} s  {what}", self.began.elapsed().as_secs())?)
    }

    async fn figures(&self, when: &str) -> Outcome<Figures> {
        let figures = figures::at_rest(self.arguments.vms).await?;
        self.say(&format!("{when}: {figures}"))?;
        Ok(figures)
    }

    /// Every VM has had a disk, and every image was there.
    async fn warm_up(&self) -> Outcome {
        self.go_on(2 * self.arguments.vms as u64, self.tally.acquires(), None).await
    }

    /// What did not come back.
    async fn run(&self) -> Outcome<Vec<String>> {
        let killed = self.arguments.acquires * KILLED_PERCENT / 100;
        self.warm_up().await?;
        let first = self.figures("after a warm-up").await?;
        self.go_on(killed, 1, Some(Troubles::all(self.arguments.seed, self.arguments.troubles_every)))
            .await?;
        let second = self.figures("after troubles of all kinds").await?;
        self.warm_up().await?;
        let third = self.figures("after another warm-up").await?;
        self.go_on(
            self.arguments.acquires - killed,
            2,
            Some(Troubles::without_kills_of_cowshed(self.arguments.seed, self.arguments.troubles_every)),
        )
        .await?;
        let last = self.figures("at the end, cowshed having lived").await?;
        let mut problems = second.differences(&first);
        problems.extend(third.differences(&first));
        problems.extend(last.differences(&first));
        problems.extend(last.differences_of_process(&third));
        problems.extend(self.tally.unexpected());
        self.say(&format!("first → last: {}", last.since(&first, &third)))?;
        Ok(problems)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let soak = Soak { arguments, began: Instant::now(), tally: Arc::default() };
    let problems = match soak.run().await {
        Ok(problems) => problems,
        Err(error) => vec![format!("it broke off: {error}")],
    };
    let mut out = std::io::stdout();
    for problem in &problems {
        let _gone = writeln!(out, "@problem {problem}");
    }
    let Arguments { vms, seed, .. } = soak.arguments;
    let _gone = writeln!(out, "@soaked {}, {vms} VMs, seed {seed}", soak.tally);
    if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
