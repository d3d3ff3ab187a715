//! Breadth first over every state that there is, each once; so what is found is found on a shortest way.

use std::{
    collections::HashSet,
    fmt,
    hash::{Hash as _, Hasher},
};

use super::{
    desk::Desk,
    flaws::Flaw,
    invariants::broken,
    rest::settles,
    world::{Bounds, Step, World},
};

/// What was seen.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) states: usize,
    pub(super) transitions: usize,
    pub(super) books: usize,
    /// So many steps was the last state away.
    pub(super) depth: usize,
    /// Whether there is nothing beyond.
    pub(super) all: bool,
}

/// What does not hold, and the way there.
#[derive(Debug)]
pub(super) struct Violation {
    pub(super) what: String,
    pub(super) way: Vec<Step>,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, transitions, books, depth, all } = self;
        let all = if *all { "all there are" } else { "more beyond" };
        write!(f, "{states} states ({all}), {books} books, {depth} steps deep, {transitions} transitions")
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, after {} steps:", self.what, self.way.len())?;
        self.way.iter().try_for_each(|step| writeln!(f, "  {step:?}"))
    }
}

/// How a state was come to: from which one, by which step.
type Origin = Option<(u32, Step)>;

struct Search {
    desk: Desk,
    bounds: Bounds,
    flaw: Option<Flaw>,
    /// Fingerprints, of 128 bits: no two are the same by chance.
    seen: HashSet<u128>,
    settled: HashSet<u128>,
    origins: Vec<Origin>,
    transitions: usize,
}

/// Every state that is at most `depth` steps away.
pub(super) fn explore(bounds: Bounds, depth: usize, flaw: Option<Flaw>) -> Result<Seen, Violation> {
    let desk = Desk::new(if let Some(Flaw::Book(flaw)) = flaw { Some(flaw) } else { None });
    let mut search = Search {
        desk,
        bounds,
        flaw,
        seen: HashSet::new(),
        settled: HashSet::new(),
        origins: Vec::new(),
        transitions: 0,
    };
    let mut border = Vec::new();
    search.come_to(World::new(), None, &mut border)?;
    let mut gone = 0;
    while gone < depth && !border.is_empty() {
        gone += 1;
        let mut next = Vec::new();
        for (number, world) in border {
            search.go_on(number, &world, &mut next)?;
        }
        border = next;
    }
    Ok(Seen {
        states: search.origins.len(),
        transitions: search.transitions,
        books: search.desk.books(),
        depth: gone,
        all: border.is_empty(),
    })
}

impl Search {
    fn go_on(&mut self, number: u32, world: &World, next: &mut Vec<(u32, World)>) -> Result<(), Violation> {
        for step in world.steps(&self.desk, self.bounds) {
            self.transitions += 1;
            let origin = Some((number, step));
            match world.after(&mut self.desk, step, self.flaw) {
                Ok(after) if after == *world || after.made > self.bounds.leases => {}
                Ok(after) => self.come_to(after, origin, next)?,
                Err(what) => return Err(self.violation(what, origin)),
            }
        }
        Ok(())
    }

    fn come_to(
        &mut self,
        world: World,
        origin: Origin,
        next: &mut Vec<(u32, World)>,
    ) -> Result<(), Violation> {
        if !self.seen.insert(fingerprint(&world)) {
            return Ok(());
        }
        broken(&world, &self.desk).map_err(|what| self.violation(what, origin))?;
        settles(world, &mut self.desk, (self.bounds.sharing, self.flaw), &mut self.settled)
            .map_err(|what| self.violation(format!("when it is left alone, {what}"), origin))?;
        next.push((self.origins.len() as u32, world));
        self.origins.push(origin);
        Ok(())
    }

    fn violation(&self, what: String, mut origin: Origin) -> Violation {
        let mut way = Vec::new();
        while let Some((from, step)) = origin {
            way.push(step);
            origin = self.origins[from as usize];
        }
        way.reverse();
        Violation { what, way }
    }
}

/// Of 128 bits: in a run of millions no two worlds have one.
pub(super) fn fingerprint(world: &World) -> u128 {
    let mut fold = Fold([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344]);
    world.hash(&mut fold);
    let [a, b] = fold.0.map(|lane| (lane ^ (lane >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93));
    (u128::from(a ^ (a >> 29)) << 64) | u128::from(b ^ (b >> 29))
}

/// Two folds by multiplication: several times as fast as what keeps an enemy out, and here is none.
struct Fold([u64; 2]);

impl Fold {
    fn fold(&mut self, word: u64) {
        let [a, b] = self.0;
        let wide = u128::from(a ^ word) * 0x9e37_79b9_7f4a_7c15_u128;
        let a = (wide as u64) ^ ((wide >> 64) as u64);
        let b = (b.rotate_left(23) ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        self.0 = [a, b ^ (b >> 31)];
    }
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0[0]
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.fold(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.fold(byte.into());
    }

    fn write_u32(&mut self, word: u32) {
        self.fold(word.into());
    }

    fn write_isize(&mut self, word: isize) {
        self.fold(word as u64);
    }
}
