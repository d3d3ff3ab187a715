//! A plan: its steps, why, what they give, and what is short after them.

use std::{fmt, time::Duration};

use cowshed_leases::{LeaseId, VmId};

use super::{Bytes, ImageName, Kind, Manifest, Pool, Protection, Room, Target, protection::Span};

/// What is to be done, in this order: an image is removed when the disks of the spares before it are gone. Each step can be
/// done again, and is then nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How full the pool was.
    pub pool: Pool,
    /// What was lacking before the first step.
    pub lacking: Room,
    /// What is to be done.
    pub steps: Vec<Step>,
    /// What comes of it.
    pub outcome: Outcome,
}

impl Plan {
    /// What comes back, at the least, when all is done; what the pool grows by is not in it.
    pub fn frees(&self) -> Room {
        let frees = self.steps.iter().filter(|step| !matches!(step.action, Action::Extend { .. }));
        frees.map(|step| step.gives).sum()
    }

    /// The same, and what the pool grows by.
    pub fn gives(&self) -> Room {
        self.steps.iter().map(|step| step.gives).sum()
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// Why this.
    pub reason: Reason,
    /// The room that it gives, at the least, after the steps before it.
    pub gives: Room,
}

/// What is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The pool is extended from its volume group.
    Extend {
        /// Of which kind of room it gets more.
        kind: Kind,
        /// What it has.
        from: Bytes,
        /// What it has then, in all.
        to: Bytes,
    },
    /// The spare is dropped.
    DropSpare {
        /// Which.
        id: LeaseId,
        /// Of what it is.
        manifest: Manifest,
    },
    /// All records of the image are removed, if they still lead to this target.
    RemoveImage {
        /// What they lead to.
        target: Target,
        /// Its names, in order.
        names: Vec<ImageName>,
    },
}

/// Why something is done, and this before others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The volume group has the room, and nothing is lost by taking it.
    Growth,
    /// The image of the spare is gone.
    SpareOfNothing,
    /// There are more spares than are kept.
    SpareAboveFloor {
        /// How many there are.
        there: u32,
        /// How many are kept.
        kept: u32,
    },
    /// It would be kept, but more is lacking than that.
    SpareUnderPressure,
    /// Its image goes.
    SpareOfRemoved,
    /// The image gives much back for how much it is used.
    Cold {
        /// For how long it was not used.
        unused: Duration,
        /// With how many others, removed next to it, it shares what comes back.
        shared_with: u32,
    },
    /// The image was not used for longer than images are kept.
    Expired {
        /// For how long it was not used.
        unused: Duration,
    },
    /// The image was used a short time ago, but the pool is about to be full.
    Emergency {
        /// For how long it was not used.
        unused: Duration,
        /// As above.
        shared_with: u32,
    },
}

impl Reason {
    /// Its stable name.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Growth => "GROWTH",
            Self::SpareOfNothing => "SPARE_OF_NOTHING",
            Self::SpareAboveFloor { .. } => "SPARE_ABOVE_FLOOR",
            Self::SpareUnderPressure => "SPARE_UNDER_PRESSURE",
            Self::SpareOfRemoved => "SPARE_OF_REMOVED",
            Self::Cold { .. } => "COLD",
            Self::Expired { .. } => "EXPIRED",
            Self::Emergency { .. } => "EMERGENCY",
        }
    }
}

/// What comes of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is lacking any more.
    Met,
    /// Something is.
    Short {
        /// What.
        lacking: Room,
        /// What would help, the most first. Not all of it.
        helps: Vec<Help>,
    },
}

/// Something that somebody could do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Help {
    /// What it is about.
    pub from: Source,
    /// What it would give, by itself, at the least.
    pub gives: Room,
}

/// Where room could come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A disk that a VM has.
    Held {
        /// The lease.
        id: LeaseId,
        /// The VM.
        vm: VmId,
    },
    /// A disk that was released, and is not gone.
    Releasing {
        /// The lease.
        id: LeaseId,
        /// The VM.
        vm: VmId,
    },
    /// An image that stays, and the disks that are made of it.
    Image {
        /// One of its names.
        name: ImageName,
        /// Why it stays.
        because: Vec<Protection>,
    },
    /// The pool, were it larger. It would have to be by so much.
    Pool {
        /// Of which kind of room.
        kind: Kind,
        /// What keeps it from growing.
        bound: Bound,
    },
}

/// What keeps a pool from growing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// It is not to grow by itself.
    Policy,
    /// It has reached its ceiling.
    Ceiling,
    /// The volume group has no more.
    VolumeGroup,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = |kind| {
            let (used, total) = (self.pool.used.of(kind), self.pool.total.of(kind));
            let percent = if total.0 == 0 { 0.0 } else { used.0 as f64 * 100.0 / total.0 as f64 };
            format!("{kind} {used} of {total} ({percent:.1} %)")
        };
        write!(f, "{}, {}", share(Kind::Data), share(Kind::Metadata))?;
        if !self.pool.returning.is_none() {
            write!(f, "; on its way back: {}", self.pool.returning)?;
        }
        writeln!(f, "; lacking: {}", self.lacking)?;
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(f, "{:>3}. {step}", number + 1)?;
        }
        match &self.outcome {
            Outcome::Met if self.steps.is_empty() => f.write_str("nothing to do"),
            Outcome::Met => write!(f, "comes back: {}; nothing is lacking then", self.frees()),
            Outcome::Short { lacking, helps } => {
                write!(f, "comes back: {}; still lacking: {lacking}", self.frees())?;
                helps.iter().try_for_each(|help| write!(f, "\n  would help: {help}"))
            }
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.action {
            Action::Extend { kind, from, to } => {
                write!(f, "extend {kind} from {from} to {to}")?;
            }
            Action::DropSpare { id, manifest } => {
                write!(f, "drop spare {id} of {manifest}: gives {}", self.gives)?;
            }
            Action::RemoveImage { target, names } => {
                let names: Vec<&str> = names.iter().map(|ImageName(name)| name.as_str()).collect();
                write!(f, "remove image {} ({target}): gives {}", names.join(", "), self.gives)?;
            }
        }
        write!(f, "; {}", self.reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unused = |f: &mut fmt::Formatter<'_>, unused: &Duration, shared_with: &u32| {
            write!(f, "not used for {}", Span(*unused))?;
            match shared_with {
                0 => Ok(()),
                1 => f.write_str(", shares layers with one other that goes"),
                n => write!(f, ", shares layers with {n} others that go"),
            }
        };
        match self {
            Self::Growth => f.write_str("the volume group has room"),
            Self::SpareOfNothing => f.write_str("its image is gone"),
            Self::SpareAboveFloor { there, kept } => write!(f, "of {there} spares {kept} are kept"),
            Self::SpareUnderPressure => f.write_str("spares go before disks are refused"),
            Self::SpareOfRemoved => f.write_str("its image goes"),
            Self::Cold { unused: age, shared_with } => unused(f, age, shared_with),
            Self::Expired { unused: age } => write!(f, "not used for {}: kept too long", Span(*age)),
            Self::Emergency { unused: age, shared_with } => {
                f.write_str("emergency: ")?;
                unused(f, age, shared_with)
            }
        }
    }
}

impl fmt::Display for Help {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gives = self.gives;
        match &self.from {
            Source::Held { id, vm } => write!(f, "{gives}: lease {id}: release VM {vm}"),
            Source::Releasing { id, vm } => {
                write!(f, "{gives}: lease {id}: VM {vm} is released, its disk goes when it is closed")
            }
            Source::Image { name, because } => {
                let because: Vec<String> = because.iter().map(Protection::to_string).collect();
                write!(f, "{gives}: image {name} with its disks: {}", because.join("; "))
            }
            Source::Pool { kind, bound } => {
                write!(f, "{gives}: the pool's {kind}: ")?;
                match bound {
                    Bound::Policy => {
                        write!(
                            f,
                            "extend it (`cowshed pool extend --{kind} +SIZE`): it does not grow by itself"
                        )
                    }
                    Bound::Ceiling => f.write_str("raise its ceiling: it has reached it"),
                    Bound::VolumeGroup => {
                        f.write_str("add a physical volume: the volume group has no more for it")
                    }
                }
            }
        }
    }
}
