//! One round: the device is compared with what it should be, and what follows from that is told.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::due::{TICK, by, is_due};
use super::joining::Joining;
use super::node::{Agent, SHOW, peers};
use super::plane::Found;
use crate::device::Look;
use crate::error::Result;
use crate::handover;
use crate::milestones::Milestone;
use crate::plan::Desired;
use crate::settings::KeyFrom;

/// After the first peers are there, the device is looked at for the first handshake: at double the time each time.
pub(super) const FIRST_HANDSHAKE: Duration = Duration::from_millis(500);

impl Agent {
    /// The registry has not answered, or does not let this node have a record: what can be done without?
    pub(super) fn do_without(&mut self, now: Instant) -> Result<()> {
        let Some(joining) = &mut self.joining else { return Ok(()) };
        if joining.address().is_some() {
            return Ok(());
        }
        if joining.settle_for_cache() {
            self.look = Some(Look::Fresh);
            log::warn!(
                "registry: no answer so far; going on with {} known from the last time",
                peers(joining.peers().count())
            );
            return Ok(());
        }
        self.park(now)
    }

    /// Has the device carry the key, if it may, so that nothing else has to.
    pub(super) fn park(&mut self, now: Instant) -> Result<()> {
        if let KeyFrom::File(_) = self.settings.key {
            return self.ready(); // which stays where it is
        }
        match self.plane.found()? {
            Found::Own => self.ready(),
            Found::Nothing => {
                let parked = Desired { address: None, peers: BTreeMap::new(), ..self.desired() };
                self.plane.reconcile(&parked, Look::Fresh, &mut self.counters)?;
                self.ready()
            }
            Found::Foreign => {
                if !self.is_ready && self.due.hold.is_none() {
                    log::warn!(
                        "{} has another node's key; it stays until the registry has given this one an address",
                        self.plane.interface()
                    );
                    self.due.hold = Some(now);
                }
                Ok(())
            }
        }
    }

    /// Compares the device with what it should be, if there is reason to.
    pub(super) fn compare(&mut self, now: Instant) -> Result<()> {
        if is_due(&mut self.due.measure, now) {
            self.measure();
        }
        let Some(look) = self.look.take() else { return Ok(()) };
        if self.own().is_none() {
            // Parked, and it should stay so.
            let is_waiting = self.due.patience.is_some();
            let parked = if is_waiting { Ok(()) } else { self.park(now) };
            return if self.is_ready { self.noted(parked, now) } else { parked };
        }
        let is_first = !self.is_up;
        if is_first {
            self.measure();
        }
        let desired = self.desired();
        let has_peers = !desired.peers.is_empty();
        let before = self.counters;
        let result = self.plane.reconcile(&desired, look, &mut self.counters);
        if self.counters != before {
            by(&mut self.due.show, now + SHOW);
        }
        if !self.is_ready {
            result?;
            self.is_up = true;
        } else {
            self.is_up = result.is_ok();
            self.noted(result, now)?;
        }
        if !self.is_up {
            return Ok(());
        }
        self.milestones.reached(Milestone::DeviceUp);
        if self.joining.as_ref().is_some_and(Joining::is_joined)
            && self.milestones.reached_so_far().joined_ms.is_none()
        {
            self.milestones.reached(Milestone::Joined);
            by(&mut self.due.show, now);
        }
        if has_peers
            && self.handshake_pause == FIRST_HANDSHAKE
            && self.milestones.reached_so_far().first_handshake_ms.is_none()
        {
            by(&mut self.due.handshake, now + FIRST_HANDSHAKE);
        }
        self.ready()
    }

    pub(super) fn noted(&mut self, result: Result<()>, now: Instant) -> Result<()> {
        if self.plane.note(result) {
            by(&mut self.due.show, now);
        }
        Ok(())
    }

    /// Tells systemd, once; and then there is to be no other copy of the key.
    pub(super) fn ready(&mut self) -> Result<()> {
        if self.is_ready {
            return Ok(());
        }
        self.is_ready = true;
        self.due.hold = None;
        self.status = self.summary();
        log::info!("{}", self.status);
        self.notify.ready(&self.status)?;
        if let KeyFrom::HandOver { .. } = self.settings.key
            && self.wipes_identity
        {
            // Without systemd there is no ExecStartPost= that would do it.
            handover::forget_here(&self.options.hand_over)?;
        }
        Ok(())
    }

    pub(super) fn look_for_handshake(&mut self, now: Instant) {
        if self.milestones.reached_so_far().first_handshake_ms.is_some() {
            return;
        }
        if let Some(when) = self.plane.first_handshake() {
            self.milestones.reached_at(Milestone::FirstHandshake, when);
            self.due.handshake = None;
        } else if is_due(&mut self.due.handshake, now) {
            self.handshake_pause = self.handshake_pause.saturating_mul(2);
            if self.handshake_pause < TICK {
                self.due.handshake = Some(now + self.handshake_pause);
            }
            by(&mut self.due.look, now);
        }
    }
}
