#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const GIB: Bytes = Bytes(1 << 30);

pub(crate) fn snapshot(id: u64, key: &str, kind: Kind) -> Snapshot {
    Snapshot {
        id: SnapshotId(id),
        key: key.to_owned(),
        kind,
        state: State::Ready,
        parent: None,
        thin: ThinId(u32::try_from(id).unwrap()),
        bytes: GIB,
        mapped: None,
        layer: false,
        torn: false,
        labels: BTreeMap::new(),
        created: UnixNanos(1),
        updated: UnixNanos(1),
    }
}

fn wish(key: &str, parent: &str) -> Wish {
    Wish {
        key: key.to_owned(),
        parent: parent.to_owned(),
        kind: Kind::Active,
        labels: BTreeMap::new(),
        base_size: GIB,
        now: UnixNanos(5),
        anew: false,
    }
}

fn label(name: &str, value: &str) -> BTreeMap<String, String> {
    BTreeMap::from([(name.to_owned(), value.to_owned())])
}

fn apply_all(tree: &mut Tree, changes: Vec<Change>) {
    changes.into_iter().for_each(|change| drop(tree.apply(change)));
}

/// Makes what is wished, with all the bases that it needs.
fn make(tree: &mut Tree, wish: &Wish) -> Result<SnapshotId> {
    loop {
        match tree.prepare(wish)? {
            Plan::Needs(base) => {
                let plan = tree.make_base(base, wish.now)?.unwrap();
                let id = plan.new.id;
                apply_all(tree, plan.changes(&HashMap::new()));
                tree.apply(tree.confirm(id)?);
            }
            Plan::Make(new, _) => {
                let id = new.id;
                tree.apply(Change::Put(new));
                tree.apply(tree.confirm(id)?);
                return Ok(id);
            }
            Plan::Inherit(heir) => {
                let id = heir.id;
                tree.apply(Change::Put(heir));
                return Ok(id);
            }
        }
    }
}

/// 0 if there is none.
fn id_of(tree: &Tree, key: &str) -> SnapshotId {
    tree.ready(key).map_or(SnapshotId(0), |s| s.id)
}

fn commit(tree: &mut Tree, name: &str, key: &str, labels: BTreeMap<String, String>) -> Result<()> {
    tree.commit(name, (key, id_of(tree, key)), labels, UnixNanos(6)).map(|change| drop(tree.apply(change)))
}

fn remove(tree: &mut Tree, key: &str) -> Result<usize> {
    let changes = tree.remove(key, UnixNanos(7))?;
    let count = changes.len();
    apply_all(tree, changes);
    Ok(count)
}

#[test]
fn refusals() {
    let mut tree = Tree::default();
    make(&mut tree, &wish("a", "")).unwrap();
    commit(&mut tree, "base", "a", BTreeMap::new()).unwrap();
    make(&mut tree, &wish("b", "base")).unwrap();
    let code = |result: Result<()>| result.unwrap_err().code;
    let prepare = |wish: Wish| tree.prepare(&wish).map(drop);
    let sized = |parent: &str, size: &str| Wish { labels: label(SIZE_LABELS[0], size), ..wish("c", parent) };
    assert_eq!(code(prepare(wish("", ""))), Code::InvalidArgument);
    assert_eq!(code(prepare(wish("b", ""))), Code::AlreadyExists);
    assert_eq!(code(prepare(wish("base", ""))), Code::AlreadyExists);
    assert_eq!(code(prepare(wish("c", "nobody"))), Code::NotFound);
    assert_eq!(code(prepare(wish("c", "b"))), Code::InvalidArgument);
    assert_eq!(code(prepare(sized("base", "512M"))), Code::InvalidArgument);
    assert_eq!(code(prepare(sized("", "1M"))), Code::InvalidArgument);
    assert_eq!(code(prepare(sized("", "much"))), Code::InvalidArgument);
    let commit = |name: &str, key: &str| {
        tree.commit(name, (key, id_of(&tree, key)), BTreeMap::new(), UnixNanos(1)).map(drop)
    };
    assert_eq!(code(commit("base", "b")), Code::AlreadyExists);
    assert_eq!(code(commit("c", "base")), Code::FailedPrecondition);
    assert_eq!(code(commit("c", "nobody")), Code::NotFound);
    assert_eq!(code(commit("", "b")), Code::InvalidArgument);
    assert_eq!(code(tree.remove("base", UnixNanos(1)).map(drop)), Code::FailedPrecondition);
    assert_eq!(tree.remove("nobody", UnixNanos(1)), Ok(vec![]));
    let update = |path: &str| tree.update("b", &BTreeMap::new(), &[path.to_owned()], UnixNanos(1)).map(drop);
    assert_eq!(code(update("parent")), Code::InvalidArgument);
    assert_eq!(update("labels"), Ok(()));
}

#[test]
fn an_image_cannot_ask_for_a_size() {
    let mut tree = Tree::default();
    let labels = [(SIZE_LABELS[0], "16MiB"), (SIZE_LABELS[1], "16TiB"), (LAYER_LABEL, "x")];
    let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let layer = make(&mut tree, &Wish { labels, ..wish("layer", "") }).unwrap();
    let layer = tree.get(layer).unwrap();
    assert_eq!((layer.bytes, layer.layer), (wish("", "").base_size, true));
    assert_eq!(tree.all().count(), 2, "a blank of another size was made");
}

#[test]
fn a_base_that_could_not_be_given_up_does_not_hide_its_successor() {
    let mut tree = Tree::default();
    let Plan::Needs(base) = tree.prepare(&wish("a", "")).unwrap() else { unreachable!() };
    let first = tree.make_base(base, UnixNanos(1)).unwrap().unwrap();
    let abandoned = first.new.id;
    apply_all(&mut tree, first.changes(&HashMap::new()));
    make(&mut tree, &wish("a", "")).unwrap();
    let second = tree.ready_base(base).unwrap().id;
    assert_ne!(second, abandoned);
    assert_eq!(tree.get(abandoned).unwrap().state, State::Removing);
    // The reclaimer hears of it late.
    let given_up = tree.give_up(abandoned, Traces::Maybe, UnixNanos(0));
    apply_all(&mut tree, given_up);
    tree.apply(Change::Delete(abandoned));
    assert_eq!(tree.ready_base(base).map(|s| s.id), Some(second));
}

/// Its namesake was flushed, and this one was not.
#[test]
fn what_was_made_anew_under_a_name_is_not_committed_for_the_one_before() {
    let mut tree = Tree::default();
    let first = make(&mut tree, &wish("a", "")).unwrap();
    remove(&mut tree, "a").unwrap();
    make(&mut tree, &wish("a", "")).unwrap();
    let refused = tree.commit("base", ("a", first), BTreeMap::new(), UnixNanos(1)).unwrap_err();
    assert_eq!(refused.code, Code::NotFound, "{refused}");
    assert_eq!(commit(&mut tree, "base", "a", BTreeMap::new()), Ok(()));
}

#[test]
fn what_is_torn_is_never_committed() {
    let mut tree = Tree::default();
    let id = make(&mut tree, &wish("a", "")).unwrap();
    let tear = tree.tear(id);
    apply_all(&mut tree, tear.into_iter().collect());
    assert_eq!(tree.tear(id), None, "it is so already");
    assert_eq!(commit(&mut tree, "base", "a", BTreeMap::new()).unwrap_err().code, Code::DataLoss);
    assert_eq!(remove(&mut tree, "a"), Ok(1));
}

#[test]
fn a_base_that_was_refused_its_thin_id_is_not_deleted_in_the_pool() {
    let mut tree = Tree::default();
    let Plan::Needs(base) = tree.prepare(&wish("a", "")).unwrap() else { unreachable!() };
    let refused = tree.make_base(base, UnixNanos(1)).unwrap().unwrap();
    let id = refused.new.id;
    apply_all(&mut tree, refused.changes(&HashMap::new()));
    let next = tree.make_base(base, UnixNanos(1)).unwrap().unwrap();
    let changes = next.changes(&HashMap::from([(id, Traces::None)]));
    assert_eq!(changes.first(), Some(&Change::Delete(id)));
}

#[test]
fn what_is_given_up_takes_the_bases_grown_from_it_along() {
    let mut tree = Tree::default();
    let layer = Wish { labels: label(LAYER_LABEL, "sha256:1"), ..wish("l", "") };
    make(&mut tree, &layer).unwrap();
    commit(&mut tree, "layer", "l", BTreeMap::new()).unwrap();
    let parent = tree.ready("layer").unwrap().id;
    let base = Base { of: Some(parent), bytes: Bytes(2 << 30), raw: false };
    let plan = tree.make_base(base, UnixNanos(1)).unwrap().unwrap();
    let grown = plan.new.id;
    apply_all(&mut tree, plan.changes(&HashMap::new()));
    let given_up = tree.give_up(parent, Traces::Maybe, UnixNanos(0));
    apply_all(&mut tree, given_up);
    assert_eq!([parent, grown].map(|id| tree.get(id).unwrap().state), [State::Removing; 2]);
    assert!(tree.confirm(grown).is_err(), "nobody can ask for it any more");
}

#[test]
fn a_base_whose_parent_is_gone_is_no_damage_but_a_snapshot_is() {
    let orphan = |kind, key: &str| Snapshot { parent: Some(SnapshotId(1)), ..snapshot(2, key, kind) };
    let tree = Tree::load(vec![orphan(Kind::Grown, "")], 3, String::new()).unwrap();
    assert_eq!(tree.get(SnapshotId(2)).unwrap().state, State::Removing);
    let damaged = Tree::load(vec![orphan(Kind::Active, "a")], 3, String::new()).unwrap_err();
    assert!(damaged.contains("has no parent 1"), "{damaged}");
}

#[test]
fn a_disk_does_not_become_a_layer_by_what_it_is_called() {
    let mut tree = Tree::default();
    make(&mut tree, &wish("vm", "")).unwrap();
    commit(&mut tree, "saved", "vm", label(LAYER_LABEL, "sha256:1")).unwrap();
    assert!(!tree.ready("saved").unwrap().layer, "root would grow a filesystem that a guest has written");
}

#[test]
fn a_removed_name_is_free_at_once_and_its_thin_id_only_when_it_is_gone() {
    let mut tree = Tree::default();
    let first = make(&mut tree, &wish("a", "")).unwrap();
    let thin = tree.get(first).unwrap().thin;
    assert_eq!(remove(&mut tree, "a"), Ok(1));
    assert_eq!(remove(&mut tree, "a"), Ok(0));
    assert_eq!(tree.ready("a").unwrap_err().code, Code::NotFound);
    let second = make(&mut tree, &wish("a", "")).unwrap();
    assert_ne!(tree.get(second).unwrap().thin, thin);
    tree.apply(Change::Delete(first));
    let third = make(&mut tree, &wish("c", "")).unwrap();
    assert_eq!(tree.get(third).unwrap().thin, thin);
    assert!(third > second && second > first, "ids are never used again");
}

#[test]
fn what_the_pool_has_is_avoided() {
    let mut tree = Tree::default();
    tree.avoid(ThinId(1));
    let Plan::Needs(base) = tree.prepare(&wish("a", "")).unwrap() else { unreachable!() };
    let blank = tree.make_base(base, UnixNanos(1)).unwrap().unwrap().new;
    let (id, taken) = (blank.id, blank.thin);
    assert_eq!(taken, ThinId(2));
    tree.apply(Change::Put(blank));
    tree.apply(tree.another_thin(id).unwrap());
    tree.avoid(taken);
    assert_eq!(tree.get(id).unwrap().thin, ThinId(3));
    assert_eq!(tree.thin_ids_used(), 3);
}

#[test]
fn blanks_of_odd_sizes_do_not_become_ever_more() {
    let mut tree = Tree::default();
    let base_size = wish("", "").base_size;
    make(&mut tree, &wish("usual", "")).unwrap();
    let asked = |n: usize| {
        let labels = label(SIZE_LABELS[0], &format!("{}MiB", 16 + n));
        // Who has asked last is served first.
        Wish { labels, now: UnixNanos(-(n as i64)), ..wish(&format!("odd-{n}"), "") }
    };
    let ready = |tree: &Tree| {
        let blanks = tree.all().filter(|s| s.kind == Kind::Blank && s.state == State::Ready);
        blanks.map(|s| s.bytes.0 >> 20).collect::<Vec<_>>()
    };
    for n in 1..=ODD_BLANKS + 3 {
        make(&mut tree, &asked(n)).unwrap();
        let new = tree.all().filter(|s| s.kind == Kind::Blank).last().unwrap().id;
        let surplus = tree.surplus_blanks(new, base_size, UnixNanos(100));
        surplus.into_iter().for_each(|change| drop(tree.apply(change)));
        assert!(ready(&tree).contains(&(16 + n as u64)), "what somebody waits for is gone");
        assert!(ready(&tree).len() <= 1 + ODD_BLANKS);
    }
    // The usual one, and the latest ones; the others are made anew.
    assert_eq!(ready(&tree).len(), 1 + ODD_BLANKS);
    assert!(ready(&tree).contains(&(base_size.0 >> 20)));
    let again = Wish { key: "again".into(), ..asked(1) };
    assert!(matches!(tree.prepare(&again), Ok(Plan::Needs(_))));
}

#[test]
fn what_is_empty_has_a_base_for_each_format() {
    let mut tree = Tree::default();
    make(&mut tree, &wish("l", "")).unwrap();
    commit(&mut tree, "layer", "l", BTreeMap::new()).unwrap();
    let raw = |key, parent, format| Wish { labels: label(FORMAT_LABEL, format), ..wish(key, parent) };
    let scratch = make(&mut tree, &raw("scratch", "", "raw")).unwrap();
    assert!(tree.get(scratch).unwrap().is_raw());
    make(&mut tree, &wish("formatted", "")).unwrap();
    let bases = |kind| tree.all().filter(|s| s.kind == kind).count();
    assert_eq!((bases(Kind::Blank), bases(Kind::Raw)), (1, 1));
    // One raw base does for all sizes.
    let sized = |key, size: &str| {
        let mut labels = label(FORMAT_LABEL, "raw");
        labels.extend(label(SIZE_LABELS[0], size));
        Wish { labels, ..wish(key, "") }
    };
    for (key, size) in [("small", "16MiB"), ("large", "3TiB")] {
        let id = make(&mut tree, &sized(key, size)).unwrap();
        assert_eq!(tree.get(id).unwrap().bytes, size.parse().unwrap());
    }
    assert_eq!(tree.all().filter(|s| s.kind == Kind::Raw).count(), 1);
    for refused in [raw("x", "layer", "raw"), raw("x", "", "xfs")] {
        assert_eq!(tree.prepare(&refused).unwrap_err().code, Code::InvalidArgument);
    }
}

#[test]
fn sizes_and_bases() {
    let mut tree = Tree::default();
    let layer = Wish { labels: label(LAYER_LABEL, "sha256:1"), ..wish("l", "") };
    make(&mut tree, &layer).unwrap();
    commit(&mut tree, "layer", "l", BTreeMap::new()).unwrap();
    let large = Wish { labels: label(SIZE_LABELS[1], "2G"), ..wish("vm", "layer") };
    let parent = tree.ready("layer").unwrap().id;
    assert_eq!(
        tree.prepare(&large),
        Ok(Plan::Needs(Base { of: Some(parent), bytes: Bytes(2 << 30), raw: false }))
    );
    let vm = make(&mut tree, &large).unwrap();
    assert_eq!(tree.get(vm).unwrap().bytes, Bytes(2 << 30));
    assert_eq!(tree.get(vm).unwrap().parent, Some(parent), "containerd sees the layer as its parent");
    // What a guest has written is not grown by us.
    commit(&mut tree, "written", "vm", BTreeMap::new()).unwrap();
    let larger = Wish { labels: label(SIZE_LABELS[0], "3G"), ..wish("vm2", "written") };
    let Plan::Make(new, origin) = tree.prepare(&larger).unwrap() else { unreachable!("it would be grown") };
    assert_eq!((new.bytes, origin.key.as_str()), (Bytes(3 << 30), "written"));
    // A grown base goes with what it is grown from.
    assert_eq!(remove(&mut tree, "written"), Ok(1));
    assert_eq!(remove(&mut tree, "layer"), Ok(2));
    assert_eq!(tree.listed().count(), 0);
}

#[test]
fn updates() {
    let mut tree = Tree::default();
    make(&mut tree, &Wish { labels: label("a", "1"), ..wish("s", "") }).unwrap();
    let mut update = |labels: &[(&str, &str)], paths: &[&str]| {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let paths: Vec<String> = paths.iter().map(|p| (*p).to_owned()).collect();
        let change = tree.update("s", &labels, &paths, UnixNanos(9)).unwrap();
        tree.apply(change);
        let labels = &tree.ready("s").unwrap().labels;
        labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(update(&[("b", "2"), ("c", "3")], &["labels.b"]), "a=1 b=2");
    assert_eq!(update(&[], &["labels.a"]), "b=2");
    assert_eq!(update(&[("x.y/z", "1")], &["labels.x.y/z", "labels.b"]), "x.y/z=1");
    assert_eq!(update(&[("q", "1")], &["labels"]), "q=1");
    assert_eq!(update(&[("r", "1")], &[]), "r=1");
}

#[test]
fn what_does_not_fit_together_is_not_loaded() {
    let good = snapshot(1, "a", Kind::Committed);
    let child = Snapshot { parent: Some(SnapshotId(1)), ..snapshot(2, "b", Kind::Active) };
    assert!(Tree::load(vec![good.clone(), child.clone()], 3, String::new()).is_ok());
    let table = [
        (vec![good.clone()], 1, "still to be given out"),
        (vec![good.clone(), Snapshot { key: "a".into(), ..child.clone() }], 3, "two snapshots"),
        (vec![good.clone(), Snapshot { thin: ThinId(1), ..child.clone() }], 3, "taken twice"),
        (vec![Snapshot { thin: ThinId(0), ..good.clone() }], 3, "not possible"),
        (vec![child.clone()], 3, "no parent"),
        (vec![Snapshot { kind: Kind::Active, ..good }, child], 3, "no parent"),
    ];
    for (snapshots, next, what) in table {
        let error = Tree::load(snapshots, next, String::new()).unwrap_err();
        assert!(error.contains(what), "{error} is not {what}");
    }
}

proptest! {
    /// Whatever is asked in whatever order: the indexes are those of the records, and every change can be taken back.
    #[test]
    fn indexes_are_those_of_the_records(steps in prop::collection::vec((0u8..6, 0u8..6, 0u8..6), 0..60)) {
        let mut tree = Tree::default();
        for (what, a, b) in steps {
            let (a, b) = (format!("s{a}"), format!("s{b}"));
            let before = tree.clone();
            let _refused = match what {
                0 => make(&mut tree, &wish(&a, "")).map(drop),
                1 => make(&mut tree, &wish(&a, &b)).map(drop),
                2 | 3 => commit(&mut tree, &a, &b, label(LAYER_LABEL, "x")),
                4 => remove(&mut tree, &a).map(drop),
                _ => {
                    let gone = tree.all().find(|s| s.state == State::Removing).map(|s| s.id);
                    if let Some(id) = gone { tree.apply(Change::Delete(id)); }
                    Ok(())
                }
            };
            let again = Tree::load(tree.all().cloned().collect(), tree.next, String::new()).map_err(TestCaseError::fail)?;
            prop_assert_eq!(&again.keys, &tree.keys);
            prop_assert_eq!(&again.children, &tree.children);
            prop_assert_eq!(&again.bases, &tree.bases);
            prop_assert_eq!(again.thins.used(), tree.thins.used());
            for snapshot in before.all() {
                let mut undone = tree.clone();
                let back = undone.apply(Change::Put(Box::new(Snapshot { updated: UnixNanos(99), ..snapshot.clone() })));
                undone.apply(back);
                prop_assert_eq!(&undone.all, &tree.all);
                prop_assert_eq!(&undone.keys, &tree.keys);
                prop_assert_eq!(&undone.children, &tree.children);
            }
        }
    }
}

#[test]
fn layers_are_known_by_their_label_or_by_the_name_that_containerd_gives_them() {
    let tree = Tree::default();
    let is_layer = |key: &str, labels| match tree.prepare(&Wish { labels, ..wish(key, "") }).unwrap() {
        Plan::Make(new, _) => new.layer,
        Plan::Inherit(_) => false,
        // The base of its own size is what a disk with a size needs.
        Plan::Needs(base) => base.bytes == Bytes(1 << 30),
    };
    let sized = || label(SIZE_LABELS[0], "3GiB");
    for key in ["default/7/extract-12-Ab_- sha256:0", "default/7/extract-x sha256:0", "extract-1 x"] {
        assert!(is_layer(key, sized()), "{key}");
    }
    for key in ["default/7/extract-12", "default/7/my-extract-12 sha256:0", "extract-1 x/7/vm", "vm"] {
        assert!(!is_layer(key, sized()), "{key}");
    }
}

/// Makes an heir, unless there is one; returns its id.
fn make_heir(tree: &mut Tree, of: SnapshotId, most: usize, now: i64) -> Option<SnapshotId> {
    let (HeirPlan { new, origin }, changes) = tree.make_heir(of, most, UnixNanos(now))?;
    assert_eq!((new.kind, new.state, new.parent), (Kind::Heir, State::Preparing, Some(origin.id)));
    apply_all(tree, changes);
    tree.apply(tree.confirm(new.id).unwrap());
    Some(new.id)
}

#[test]
fn an_heir_is_the_next_active_snapshot_of_its_parent_and_size() {
    let mut tree = Tree::default();
    make(&mut tree, &Wish { labels: label(LAYER_LABEL, "x"), ..wish("a", "") }).unwrap();
    commit(&mut tree, "base", "a", BTreeMap::new()).unwrap();
    let base = id_of(&tree, "base");
    let heir = make_heir(&mut tree, base, 4, 1).unwrap();
    assert_eq!(make_heir(&mut tree, base, 4, 1), None, "it has one");
    assert_eq!(tree.listed().count(), 1, "containerd knows of none");
    let anew = [
        Wish { kind: Kind::View, ..wish("view", "base") },
        Wish { labels: label(SIZE_LABELS[0], "2GiB"), ..wish("large", "base") },
        Wish { anew: true, ..wish("anew", "base") },
    ];
    for wish in anew {
        assert_eq!(tree.wants_heir_of(&wish), None, "{wish:?}");
        assert!(!matches!(tree.prepare(&wish).unwrap(), Plan::Inherit(_)), "{wish:?}");
    }
    let disk = Wish { labels: label("a", "1"), now: UnixNanos(9), ..wish("vm", "base") };
    assert_eq!(tree.wants_heir_of(&disk), Some(base));
    assert_eq!(make(&mut tree, &disk), Ok(heir));
    assert_eq!(tree.wants_heir_of(&disk), None, "it is there");
    let given = tree.ready("vm").unwrap();
    assert_eq!((given.kind, given.parent, given.created), (Kind::Active, Some(base), UnixNanos(9)));
    assert_eq!((given.layer, &given.labels), (false, &label("a", "1")));
    assert_eq!(
        tree.remove("base", UnixNanos(1)).unwrap_err().code,
        Code::FailedPrecondition,
        "it has a child now"
    );
    assert!(tree.heir(tree.ready("base").unwrap()).is_none());
    assert_ne!(make(&mut tree, &wish("vm2", "base")), Ok(heir));
    // Who has its record reads the same tree.
    let stored = Tree::load(tree.all().cloned().collect(), 100, String::new()).unwrap();
    assert_eq!(stored.ready("vm").unwrap(), tree.ready("vm").unwrap());
}

#[test]
fn heirs_go_with_their_parents_or_when_they_are_old_or_too_many() {
    let mut tree = Tree::default();
    let bases = ["0", "1", "2"].map(|name| {
        make(&mut tree, &wish("a", "")).unwrap();
        commit(&mut tree, name, "a", BTreeMap::new()).unwrap();
        id_of(&tree, name)
    });
    assert_eq!(make_heir(&mut tree, SnapshotId(99), 2, 1), None, "of what is not there");
    let ids = |tree: &Tree| tree.heirs().map(|heir| heir.id).collect::<BTreeSet<_>>();
    let [first, second] = [0, 1].map(|n| make_heir(&mut tree, bases[n], 2, n as i64 + 1).unwrap());
    assert_eq!(ids(&tree), [first, second].into());
    let third = make_heir(&mut tree, bases[2], 2, 3).unwrap();
    assert_eq!(ids(&tree), [second, third].into(), "no more than two");
    let old = tree.old_heirs(UnixNanos(3), UnixNanos(9));
    apply_all(&mut tree, old);
    assert_eq!(ids(&tree), [third].into(), "no old ones");
    assert_eq!(remove(&mut tree, "2"), Ok(2));
    assert_eq!(ids(&tree), [].into(), "none without its parent");
    assert_eq!(tree.removing().count(), 4);
    // One that is being made when its parent goes.
    let (HeirPlan { new, .. }, changes) = tree.make_heir(bases[0], 2, UnixNanos(1)).unwrap();
    apply_all(&mut tree, changes);
    assert!(tree.heirs().next().is_none(), "it is not there yet");
    assert!(matches!(tree.prepare(&wish("b", "0")).unwrap(), Plan::Make(..)));
    remove(&mut tree, "0").unwrap();
    assert_eq!(tree.confirm(new.id).unwrap_err().code, Code::Internal);
}
