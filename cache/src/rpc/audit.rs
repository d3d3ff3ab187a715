//! `Audit`: findings as messages.

use cowshed_proto::v1;

use crate::audit::Audited;

pub(super) fn finding(audited: Audited) -> v1::Finding {
    let Audited { finding, mended } = audited;
    v1::Finding {
        subject: finding.subject.to_string(),
        problem: finding.problem,
        remedy: finding.remedy.to_string(),
        mended: mended.as_ref().is_some_and(Result::is_ok),
        error: mended.and_then(Result::err).unwrap_or_default(),
    }
}
