//! Against registries that answer at once, late or never, and one that speaks HTTP.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    sync::atomic::{AtomicUsize, Ordering},
};

use super::*;

const INTERVAL: Duration = Duration::from_secs(600);
const SECOND: Duration = Duration::from_secs(1);

fn digest(what: &str) -> Digest {
    Digest::of(what.as_bytes())
}

/// What a registry says, how long it takes for it, and how often it was asked.
#[derive(Clone)]
struct Fake {
    questions: Questions,
    access: Access,
    asked: Arc<AtomicUsize>,
    says: Option<Digest>,
    takes: Duration,
}

impl Fake {
    fn new(says: Option<&str>, takes: Duration) -> Self {
        let (questions, access, asked) = (Questions::default(), Access::default(), Arc::default());
        Self { questions, access, asked, says: says.map(digest), takes }
    }

    async fn has_moved_from(&self, here: &str) -> bool {
        let Self { asked, says, takes, .. } = self.clone();
        let asking = async move {
            asked.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(takes).await;
            says.ok_or_else(|| Error::new(Reason::RegistryUnavailable, "it is down"))
        };
        let image = ImageRef::parse("r.example/x:1").unwrap();
        self.questions.has_moved((&image, &self.access), &digest(here), INTERVAL, asking).await
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}

#[tokio::test(start_paused = true)]
async fn a_hundred_at_once_are_one_question_of_each_access() {
    for (says, moved) in [(Some("new"), true), (Some("old"), false), (None, false)] {
        let fake = Fake::new(says, SECOND);
        let stranger =
            Fake { access: Access { tenant: "b".parse().unwrap(), ..Access::default() }, ..fake.clone() };
        let all = (0..100).map(|n| if n % 2 == 0 { &fake } else { &stranger });
        let said = future::join_all(all.map(|fake| fake.has_moved_from("old"))).await;
        assert!(said.iter().all(|said| *said == moved), "{says:?}: {said:?}");
        assert_eq!(fake.asked(), 2, "{says:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_moved_tag_is_found_after_the_interval() {
    let before = Fake::new(Some("old"), Duration::ZERO);
    assert!(!before.has_moved_from("old").await);
    let after = Fake { says: Some(digest("new")), ..before };
    pass(INTERVAL - SECOND).await;
    assert!(!after.has_moved_from("old").await);
    assert_eq!(after.asked(), 1);
    pass(SECOND).await;
    assert!(after.has_moved_from("old").await);
    // Until it is pulled, whoever comes is told so; then it is what was said.
    assert!(after.has_moved_from("old").await);
    assert!(!after.has_moved_from("new").await);
    assert_eq!(after.asked(), 2);
    // Something else was pulled.
    assert!(after.has_moved_from("newer").await);
    assert_eq!(after.asked(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_failure_counts_for_a_pause() {
    let fake = Fake::new(None, Duration::ZERO);
    for (after, asked) in [(Duration::ZERO, 1), (PAUSE - SECOND, 1), (SECOND, 2), (SECOND, 2)] {
        pass(after).await;
        assert!(!fake.has_moved_from("old").await);
        assert_eq!(fake.asked(), asked);
    }
    // Up again.
    let fake = Fake { says: Some(digest("new")), ..fake };
    pass(PAUSE).await;
    assert!(fake.has_moved_from("old").await);
}

#[tokio::test(start_paused = true)]
async fn one_that_hangs_is_waited_for_once_and_not_for_long() {
    let fake = Fake::new(Some("new"), Duration::from_secs(3600));
    let begun = Instant::now();
    assert!(!fake.has_moved_from("old").await);
    assert!(begun.elapsed() < PATIENCE + SECOND);
    // While it is being asked still, and when that was in vain.
    for _ in 0..20 {
        let begun = Instant::now();
        assert!(!fake.has_moved_from("old").await);
        assert!(begun.elapsed() < SECOND);
        pass(SECOND).await;
    }
    assert_eq!(fake.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_is_the_next_one_s() {
    let fake = Fake::new(Some("new"), PATIENCE + SECOND);
    assert!(!fake.has_moved_from("old").await);
    pass(2 * SECOND).await;
    assert!(fake.has_moved_from("old").await);
    assert_eq!(fake.asked(), 1);
}

#[tokio::test(start_paused = true)]
#[allow(clippy::panic, reason = "it is what is tested")]
async fn one_that_panics_is_no_answer_and_asked_again_in_time() {
    let questions = Questions::default();
    let (image, access, here) = (ImageRef::parse("r/x:1").unwrap(), Access::default(), digest("old"));
    let crashed = questions.has_moved((&image, &access), &here, INTERVAL, async { panic!("on purpose") });
    assert!(!crashed.await);
    pass(2 * DEADLINE).await;
    let answers = async { Ok(digest("new")) };
    assert!(questions.has_moved((&image, &access), &here, INTERVAL, answers).await);
}

/// By its manifest, without fetching anything else.
#[tokio::test]
async fn a_registry_is_asked_for_its_manifest() {
    use axum::{Router, extract::Request, http};
    // Another test may have done it.
    let _done = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = listener.local_addr().unwrap().to_string();
    let (says, asked) = (Arc::new(Mutex::new(Some("old"))), Arc::new(AtomicUsize::new(0)));
    let (body, told) = (says.clone(), asked.clone());
    let serve = Router::new().fallback(async move |request: Request| {
        let Some(path) = request.uri().path().strip_prefix("/v2/x/") else {
            return (http::StatusCode::OK, "");
        };
        assert_eq!(path, "manifests/1");
        told.fetch_add(1, Ordering::Relaxed);
        match *body.lock().unwrap() {
            Some(body) => (http::StatusCode::OK, body),
            None => (http::StatusCode::NOT_FOUND, ""),
        }
    });
    tokio::spawn(async { axum::serve(listener, serve).await });
    let directory = tempfile::tempdir().unwrap();
    let hosts = directory.path().join(&authority);
    fs::create_dir(&hosts).unwrap();
    fs::write(hosts.join("hosts.toml"), format!("server = \"http://{authority}\"\n")).unwrap();
    let (patience, none) = (Duration::from_secs(20), directory.path().join("config.json"));
    let registries = Registries::new(directory.path().to_owned(), none, patience, patience, 0);
    let image = ImageRef::parse(&format!("{authority}/x:1")).unwrap();
    let (access, here) = (Access::default(), digest("old"));
    // What it says, whether that is another, and how often it is asked by now; each a new question, and what follows one.
    for (body, moved, times) in [(Some("old"), false, 1), (None, false, 2), (Some("new"), true, 3)] {
        *says.lock().unwrap() = body;
        let questions = Questions::default();
        for _ in 0..3 {
            let asking = meaning(registries.clone(), image.clone(), None);
            assert_eq!(
                questions.has_moved((&image, &access), &here, INTERVAL, asking).await,
                moved,
                "{body:?}"
            );
            assert_eq!(asked.load(Ordering::Relaxed), times, "{body:?}");
        }
    }
}
