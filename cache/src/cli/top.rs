//! Which VMs write, again and again: in place on a terminal, once elsewhere, a document for each look for programs.

use std::time::Duration;

use console::Term;
use cowshed_proto::v1::{self, cowshed_client::CowshedClient};
use tonic::transport::Channel;

use super::{
    By, Failure, Output,
    client::refused,
    print,
    show::line,
    status::{self, Look},
};
use crate::exit;

/// Images that are told of.
const IMAGES: u32 = 5;
/// VMs where nobody says how many there is room for.
const VMS: u32 = 20;
/// Lines that are not VMs'.
const OTHER_LINES: u32 = 18;
/// A look is answered in this time, or not at all.
const LIMIT: Duration = Duration::from_secs(60);

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) by: By,
    pub(super) interval: Duration,
    pub(super) vms: Option<u32>,
    pub(super) once: bool,
    pub(super) output: Output,
}

struct Seen {
    status: v1::GetStatusResponse,
    usage: v1::GetUsageResponse,
}

/// Looks until it is interrupted.
pub(super) async fn run(client: &mut CowshedClient<Channel>, asked: Asked) -> Result<(), Failure> {
    let look = Look::of_stdout();
    match asked.output {
        _ if asked.once => once(client, asked, look).await,
        Output::Text if look == Look::Plain => once(client, asked, look).await,
        Output::Text => live(client, asked, look).await,
        Output::Json => loop {
            let seen = see(client, asked, VMS).await?;
            print(&document(&seen))?;
            tokio::time::sleep(asked.interval).await;
        },
    }
}

/// Two looks, for rates are from one to the next.
async fn once(client: &mut CowshedClient<Channel>, asked: Asked, look: Look) -> Result<(), Failure> {
    see(client, asked, VMS).await?;
    tokio::time::sleep(asked.interval).await;
    let seen = see(client, asked, VMS).await?;
    match asked.output {
        Output::Json => print(&document(&seen)),
        Output::Text => print(&frame(&seen, look)),
    }
}

/// In place, on the terminal's other screen, so that what was there before is there again.
async fn live(client: &mut CowshedClient<Channel>, asked: Asked, look: Look) -> Result<(), Failure> {
    let terminal = Term::stdout();
    print("\x1b[?1049h\x1b[?25l")?;
    let watched = tokio::select! {
        watched = refresh(client, asked, look, &terminal) => watched,
        interrupted = tokio::signal::ctrl_c() => interrupted.map_err(|e| Failure {
            message: format!("interrupts cannot be handled: {e}"),
            status: exit::FAILURE,
        }),
    };
    print("\x1b[?25h\x1b[?1049l")?;
    watched
}

async fn refresh(
    client: &mut CowshedClient<Channel>,
    asked: Asked,
    look: Look,
    terminal: &Term,
) -> Result<(), Failure> {
    loop {
        let (lines, columns) = terminal.size();
        let vms = u32::from(lines).saturating_sub(OTHER_LINES).max(1);
        let seen = see(client, asked, vms).await?;
        print(&in_place(&frame(&seen, look), lines.into(), columns.into()))?;
        tokio::time::sleep(asked.interval).await;
    }
}

async fn see(client: &mut CowshedClient<Channel>, asked: Asked, vms: u32) -> Result<Seen, Failure> {
    let order = match asked.by {
        By::Rate => v1::UsageOrder::Rate,
        By::Own => v1::UsageOrder::Own,
        By::Written => v1::UsageOrder::Written,
    };
    let request = v1::GetUsageRequest { vms: asked.vms.unwrap_or(vms), images: IMAGES, order: order.into() };
    let seeing = async {
        let status = client.get_status(v1::GetStatusRequest {}).await?.into_inner();
        let usage = client.get_usage(request).await?.into_inner();
        Ok(Seen { status, usage })
    };
    let seen = tokio::time::timeout(LIMIT, seeing).await;
    let late =
        |_| Err(tonic::Status::deadline_exceeded(format!("the service has not answered within {LIMIT:?}")));
    seen.unwrap_or_else(late).map_err(|status| refused(&status))
}

fn document(seen: &Seen) -> String {
    line(&status::status_json(&seen.status, Some(&seen.usage)))
}

fn frame(seen: &Seen, look: Look) -> String {
    let Seen { status, usage } = seen;
    [
        status::head(status, look),
        status::pool(status, look),
        status::of_vms(usage, look),
        status::of_images(usage, look),
    ]
    .concat()
}

/// Over what is there, without a flicker: each line is cut to the terminal's width, and cleared to its end.
fn in_place(frame: &str, lines: usize, columns: usize) -> String {
    let mut text = "\x1b[H".to_owned();
    let shown: Vec<_> = frame.lines().take(lines.saturating_sub(1)).collect();
    for line in shown {
        text.push_str(&console::truncate_str(line, columns, "…"));
        text.push_str("\x1b[K\n");
    }
    text.push_str("\x1b[J");
    text
}

#[cfg(test)]
mod tests {
    use super::in_place;

    #[test]
    fn a_frame_fits_the_terminal() {
        let frame = "one\n\x1b[31mtwo is long\x1b[0m\nthree\nfour\n";
        let text = in_place(frame, 4, 6);
        assert_eq!(text, "\x1b[Hone\x1b[K\n\x1b[31mtwo i…\x1b[0m\x1b[K\nthree\x1b[K\n\x1b[J");
    }
}
