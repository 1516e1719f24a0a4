//! `latchkey status --watch`: a screen that is drawn again each second, or where no one looks at a screen, what has changed, a line
//! each.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::future::Future;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use super::text::{Registry, age, name_of};
use super::{Detail, PeerStatus, Status};
use crate::error::{Error, Result};
use crate::terminal::printable;

/// Nobody is told when a device's counters change.
const PERIOD: Duration = Duration::from_secs(1);

/// WireGuard renews the keys of a session in use every two minutes and gives it up after three (REJECT_AFTER_TIME).
const ALIVE: Duration = Duration::from_secs(180);

/// How a status is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Text(Detail),
    Json,
}

/// Shows what `read` yields, until SIGINT or SIGTERM, or until nobody reads it any more.
///
/// # Errors
/// Of the first look. What goes wrong later is shown, and tried again.
pub async fn watch<R>(mut read: impl FnMut() -> R, form: Form) -> Result<()>
where
    R: Future<Output = Result<Status>>,
{
    let on = |kind| {
        let action = "wait for signals".into();
        signal(kind).map_err(|source| Error::Kernel { action, source })
    };
    let (mut interrupt, mut terminate) =
        (on(SignalKind::interrupt())?, on(SignalKind::terminate())?);
    let mut shown = Shown::new(form);
    shown.first(read().await?)?;
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            () = sleep(PERIOD) => {}
        }
        let next = tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            next = read() => next,
        };
        match shown.next(next) {
            Err(Error::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            done => done?,
        }
    }
}

/// What was shown last, and how.
struct Shown {
    form: Form,
    screen: bool,
    last: Option<(Status, SystemTime)>,
    trouble: Option<String>,
}

impl Shown {
    fn new(form: Form) -> Self {
        Self { form, screen: io::stdout().is_terminal(), last: None, trouble: None }
    }

    fn first(&mut self, status: Status) -> Result<()> {
        let now = SystemTime::now();
        match self.form {
            Form::Text(detail) if self.screen => {
                // What stands on the screen is scrolled away, not written over.
                print(&"\n".repeat(size().0)).and_then(|()| draw(&status.to_text(detail, now)))
            }
            Form::Text(detail) => print(&status.to_text(detail, now)),
            Form::Json => print(&line_of(&status)?),
        }?;
        self.last = Some((status, now));
        Ok(())
    }

    fn next(&mut self, status: Result<Status>) -> Result<()> {
        let now = SystemTime::now();
        let status = match status {
            Ok(status) => status,
            Err(error) => return self.say(&error.to_string()),
        };
        self.trouble = None;
        let same = self.last.as_ref().is_some_and(|(last, _)| *last == status);
        match (self.form, &self.last) {
            (Form::Text(detail), _) if self.screen => draw(&status.to_text(detail, now))?,
            (Form::Json, _) if same => {}
            (Form::Json, _) => print(&line_of(&status)?)?,
            (Form::Text(_), Some((last, then))) => {
                print(&changes((last, *then), (&status, now)).concat())?;
            }
            (Form::Text(detail), None) => print(&status.to_text(detail, now))?,
        }
        self.last = Some((status, now));
        Ok(())
    }

    /// Once, until it has changed or passed.
    fn say(&mut self, trouble: &str) -> Result<()> {
        if self.trouble.as_deref() == Some(trouble) {
            return Ok(());
        }
        self.trouble = Some(trouble.into());
        log::error!("{}", printable(trouble));
        Ok(())
    }
}

/// JSON of one line, as what reads a stream of them expects.
fn line_of(status: &Status) -> Result<String> {
    Ok(format!("{}\n", serde_json::to_string(status)?))
}

fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)
}

/// From the screen's upper left corner, without clearing first, which would flicker; as much as there is room for.
fn draw(text: &str) -> Result<()> {
    let (rows, columns) = size();
    print(&screen(text, rows, columns))
}

/// Rows and columns; 0 where the terminal does not say.
fn size() -> (usize, usize) {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok();
    size.map_or((0, 0), |size| (size.ws_row.into(), size.ws_col.into()))
}

/// A terminal that does not say its size (0) is taken to be large enough.
fn screen(text: &str, rows: usize, columns: usize) -> String {
    const HOME: &str = "\x1b[H";
    const CLEAR_LINE: &str = "\x1b[K";
    const CLEAR_REST: &str = "\x1b[J";
    let total = text.lines().count();
    // The last row is the cursor's.
    let room = if rows > 1 { rows - 1 } else { total };
    let shown = if total > room { room.saturating_sub(1) } else { total };
    let mut drawn = String::from(HOME);
    for line in text.lines().take(shown) {
        let cut = if columns > 0 { columns } else { usize::MAX };
        drawn.extend(line.chars().take(cut));
        drawn.push_str(CLEAR_LINE);
        drawn.push('\n');
    }
    if total > shown {
        let _ = writeln!(drawn, "({} more lines){CLEAR_LINE}", total - shown);
    }
    drawn.push_str(CLEAR_REST);
    drawn
}

/// What is worth a line: not each byte, but who comes, goes, moves, or falls silent.
fn changes(then: (&Status, SystemTime), now: (&Status, SystemTime)) -> Vec<String> {
    let ((before, then), (after, now)) = (then, now);
    let mut lines = node_changes(before, after, now);
    if before.device_error.is_some() || after.device_error.is_some() {
        return lines; // nobody went or came: one of both is blind
    }
    fn by_key(status: &Status) -> BTreeMap<&str, &PeerStatus> {
        status.peers.iter().map(|peer| (peer.public_key.as_str(), peer)).collect()
    }
    let (old, new) = (by_key(before), by_key(after));
    for (key, peer) in &new {
        let said = match old.get(key) {
            None => vec!["new".into()],
            Some(old) => peer_changes((old, then), (peer, now)),
        };
        let name = name_of(peer);
        lines.extend(said.into_iter().map(|what| format!("peer {name}: {what}\n")));
    }
    let gone = old.iter().filter(|(key, _)| !new.contains_key(*key));
    lines.extend(gone.map(|(_, peer)| format!("peer {}: gone\n", name_of(peer))));
    lines
}

fn node_changes(before: &Status, after: &Status, now: SystemTime) -> Vec<String> {
    let mut lines = Vec::new();
    fn state(status: &Status) -> &str {
        match (&status.device, &status.device_error) {
            (Some(device), _) if device.up => "up",
            (Some(_), _) => "down",
            (None, Some(error)) => error,
            (None, None) => "none",
        }
    }
    if state(before) != state(after) {
        lines.push(format!("device: {}\n", printable(state(after))));
    }
    match (&before.agent_error, &after.agent_error) {
        (Some(_), None) => lines.push("agent: answers\n".into()),
        (old, Some(error)) if old.as_ref() != Some(error) => {
            lines.push(format!("agent: {}\n", printable(error)));
        }
        _ => {}
    }
    let (Some(old), Some(new)) = (&before.agent, &after.agent) else { return lines };
    if old.node.allowed_ip != new.node.allowed_ip {
        let own = new.node.allowed_ip.as_deref().unwrap_or("none");
        lines.push(format!("own range: {}\n", printable(own)));
    }
    if old.node.trouble != new.node.trouble {
        let trouble = new.node.trouble.as_deref().unwrap_or("none any more");
        lines.push(format!("trouble: {}\n", printable(trouble)));
    }
    let known = |registry: &Option<crate::view::RegistryView>| {
        registry.as_ref().map(|known| (known.state, known.reason.clone(), known.from_cache))
    };
    if let Some(registry) = &new.registry
        && known(&old.registry) != known(&new.registry)
    {
        lines.push(format!("registry: {}\n", Registry(registry, now)));
    }
    let fresh = new.problems.iter().filter(|problem| !old.problems.contains(problem));
    lines.extend(fresh.map(|problem| {
        let (key, reason) = (printable(&problem.key), printable(&problem.reason));
        format!("record {key}: does not count: {reason}\n")
    }));
    lines
}

fn peer_changes(then: (&PeerStatus, SystemTime), now: (&PeerStatus, SystemTime)) -> Vec<String> {
    let mut said = Vec::new();
    let alive = |(peer, at): (&PeerStatus, SystemTime)| {
        peer.latest_handshake.is_some_and(|handshake| age(handshake, at) < ALIVE)
    };
    let ((old, _), (new, _)) = (then, now);
    match (alive(then), alive(now)) {
        (false, true) => said.push("heard of".into()),
        (true, false) => said.push("silent".into()),
        _ => {}
    }
    if let Some(endpoint) = &new.endpoint
        && old.endpoint.as_ref() != Some(endpoint)
    {
        said.push(format!("at {endpoint}"));
    }
    match (old.on_device, new.on_device) {
        (true, false) => said.push("not on the device any more".into()),
        (false, true) => said.push("on the device".into()),
        _ => {}
    }
    said
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOW, member, now, peer, up, with_agent};
    use super::*;

    #[test]
    fn a_screen_is_filled_and_no_more() {
        let text = "one\ntwo\nthree\n";
        let whole = "\x1b[Hone\x1b[K\ntwo\x1b[K\nthree\x1b[K\n\x1b[J";
        assert_eq!(screen(text, 4, 80), whole);
        assert_eq!(screen(text, 0, 0), whole);
        assert_eq!(screen(text, 3, 2), "\x1b[Hon\x1b[K\n(2 more lines)\x1b[K\n\x1b[J");
    }

    #[test]
    fn what_comes_goes_moves_and_falls_silent_is_a_line_each() {
        let mut old = with_agent(up());
        old.peers = vec![
            PeerStatus { latest_handshake: Some(NOW - 100), member: Some(member("b")), ..peer() },
            PeerStatus { public_key: "gone".into(), ..peer() },
        ];
        let mut new = with_agent(up());
        new.peers = vec![
            PeerStatus {
                endpoint: Some("192.0.2.9:1".into()),
                received_bytes: 5_000,
                ..old.peers[0].clone()
            },
            PeerStatus { public_key: "new".into(), ..peer() },
        ];
        let mut lost = new.agent.clone().unwrap();
        lost.node.trouble = Some("no \u{7}".into());
        let registry = lost.registry.as_mut().unwrap();
        registry.state = crate::view::RegistryState::Away;
        registry.reason = Some("connection refused".into());
        new.agent = Some(lost);
        let later = now() + Duration::from_secs(90);
        assert_eq!(
            changes((&old, now()), (&new, later)).concat(),
            "\
trouble: no \\u{7}
registry: away for 6 minutes, 30 seconds: connection refused (nats://10.0.0.5:4222, bucket ikto-mesh, revision 12)
peer b: silent
peer b: at 192.0.2.9:1
peer (new…): new
peer (gone…): gone
"
        );
        assert_eq!(changes((&new, later), (&new, later)), [""; 0]);
    }

    #[test]
    fn an_agent_that_goes_and_comes_back_is_told() {
        let with = with_agent(up());
        let mut without = up();
        without.device = None;
        without.agent_error = Some("nobody answers".into());
        let gone = changes((&with, now()), (&without, now()));
        assert_eq!(gone, ["device: none\n", "agent: nobody answers\n"]);
        assert_eq!(
            changes((&without, now()), (&with, now())),
            ["device: up\n", "agent: answers\n"]
        );
    }
}
