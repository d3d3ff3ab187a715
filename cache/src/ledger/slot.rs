//! The ledger, or why it cannot be had yet.

use std::sync::Arc;

use tokio::sync::watch;

use super::Ledger;
use crate::error::{Error, Reason};

/// Where the ledger is put when it is open; it stays. Clones are the same one.
#[derive(Clone)]
pub struct LedgerSlot(Arc<watch::Sender<Result<Ledger, Error>>>);

impl Default for LedgerSlot {
    fn default() -> Self {
        let why = Error::new(Reason::LedgerUnusable, "the ledger is being opened; try again");
        Self(Arc::new(watch::Sender::new(Err(why))))
    }
}

impl From<Ledger> for LedgerSlot {
    fn from(ledger: Ledger) -> Self {
        let slot = Self::default();
        slot.put(ledger);
        slot
    }
}

impl LedgerSlot {
    /// The ledger.
    ///
    /// # Errors
    /// LEDGER_UNUSABLE, with what is wrong and the way out.
    pub fn get(&self) -> Result<Ledger, Error> {
        self.0.borrow().clone()
    }

    /// It is open.
    pub fn put(&self, ledger: Ledger) {
        // What was there before was an error.
        let _before = self.0.send_replace(Ok(ledger));
    }

    /// It cannot be opened, because of `what`. Nothing if it is open.
    pub fn refuse(&self, what: impl Into<String>) {
        let why = Error::new(Reason::LedgerUnusable, what);
        self.0.send_if_modified(|now| {
            let is_news = matches!(now, Err(before) if before.to_string() != why.to_string());
            if is_news {
                *now = Err(why);
            }
            is_news
        });
    }

    /// Told of each change.
    pub fn changes(&self) -> watch::Receiver<Result<Ledger, Error>> {
        self.0.subscribe()
    }
}
