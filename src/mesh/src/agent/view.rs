//! What the agent shows of itself.

use std::time::{SystemTime, UNIX_EPOCH};

use super::node::Agent;
use crate::view::{self, Node, Problem, RegistryView, View};

/// When the registry's state was another.
#[derive(Debug, Default)]
pub(super) struct Since {
    state: view::RegistryState,
    seconds: u64,
}

impl Since {
    fn of(&mut self, state: view::RegistryState) -> u64 {
        if self.seconds == 0 || self.state != state {
            self.state = state;
            self.seconds =
                SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        }
        self.seconds
    }
}

impl Agent {
    pub(super) fn view(&mut self) -> View {
        let reached = self.milestones.reached_so_far();
        let settings = &self.settings;
        let advertised = self.advertised.as_ref();
        let node = Node {
            name: settings.name.clone(),
            public_key: self.plane.public_key().to_string(),
            mesh: settings.mesh.to_string(),
            allowed_ip: self.own().map(|own| own.to_string()),
            advertise_address: advertised
                .map(|known| known.address.to_string())
                .unwrap_or_default(),
            wg_port: settings.port,
            interface: settings.interface.clone(),
            backend: self.plane.backend().into(),
            mtu: self.mtu(),
            persistent_keepalive: self.keepalive(),
            trouble: self.plane.trouble().map(Into::into),
            up_at_ms: reached.device_up_ms,
            joined_at_ms: reached.joined_ms,
        };
        let Some(joining) = &self.joining else {
            return View {
                version: view::VERSION,
                node,
                counters: self.counters,
                ..View::default()
            };
        };
        let (state, reason) = joining.state();
        let registry = RegistryView {
            at: self.registry_at.clone(),
            state,
            reason,
            since: self.since.of(state),
            revision: joining.revision(),
            from_cache: joining.is_from_cache(),
        };
        let mut problems = joining.problems();
        problems.extend(self.plane.refused().iter().filter_map(|(public_key, reason)| {
            let member = joining.member(public_key)?;
            Some(Problem {
                key: public_key.to_string(),
                revision: member.revision,
                reason: format!("the device does not take this peer: {reason}"),
            })
        }));
        View {
            version: view::VERSION,
            node,
            registry: Some(registry),
            members: joining.views(),
            problems,
            counters: self.counters,
        }
    }
}
