//! SIGHUP: the configuration is read again, and what can be changed while the agent runs is changed.

use std::sync::Arc;

use super::due::by;
use super::inputs::Inputs;
use super::node::Agent;
use crate::error::Result;
use crate::metrics;
use crate::registry::Registry as _;
use crate::registry::nats::Nats;
use crate::settings::Settings;

impl Agent {
    /// A configuration that is no good is said in the log, and the old one stays.
    pub(super) fn reload(&mut self, inputs: &mut Inputs) {
        if self.is_ready {
            self.tell(self.notify.reloading());
        }
        match (self.options.settings_again)().and_then(|settings| self.take(settings, inputs)) {
            Ok(()) => log::info!("the configuration was read again"),
            Err(error) => log::error!("the configuration stays as it was: {error}"),
        }
        self.status = self.summary();
        self.tell(if self.is_ready {
            self.notify.ready(&self.status)
        } else {
            self.notify.status(&self.status)
        });
    }

    /// All of it or nothing.
    fn take(&mut self, mut new: Settings, inputs: &mut Inputs) -> Result<()> {
        let old = Arc::clone(&self.settings);
        for what in keep_what_needs_a_restart(&old, &mut new) {
            log::warn!("{what} has changed: that needs a restart (systemctl restart latchkey)");
        }
        let metrics = match new.metrics.filter(|_| new.metrics != old.metrics) {
            Some(address) => Some(metrics::Server::bind(address)?),
            None => None,
        };
        let registry = match &new.registry {
            Some(registry) if new.registry != old.registry => {
                Some((registry.clone(), Nats::connect(registry.clone())?))
            }
            _ => None,
        };
        self.settings = Arc::new(new);
        if self.settings.metrics != old.metrics {
            if let Some(serving) = self.metrics.take() {
                serving.abort();
            }
            self.metrics = metrics.map(|server| self.serve_metrics(server));
        }
        if let (Some((registry, nats)), Some(joining)) = (registry, &mut self.joining) {
            joining.registry_changed(&registry.bucket);
            self.registry_at = nats.describe();
            log::info!("registry: {}", self.registry_at);
            inputs.watch = Some(nats.watch());
            self.registry = Some(nats);
        }
        if let Some(joining) = &mut self.joining
            && (self.settings.signatures != old.signatures
                || self.settings.strict_records != old.strict_records)
        {
            joining.judge_by(self.settings.signatures, self.settings.strict_records);
        }
        if self.settings.advertise != old.advertise {
            self.advertised = None; // what it was is no answer to what is asked now
        }
        self.ask_advertised();
        self.want();
        self.look_fresh();
        by(&mut self.due.measure, std::time::Instant::now());
        Ok(())
    }
}

/// Puts the old values in the place of those that cannot change now, and says which.
fn keep_what_needs_a_restart(old: &Settings, new: &mut Settings) -> Vec<&'static str> {
    let mut kept = Vec::new();
    let mut keep = |what, is_same: bool| {
        if !is_same {
            kept.push(what);
        }
    };
    keep("the interface", old.interface == new.interface);
    keep("the network or the key", old.key == new.key);
    keep("the mesh's prefix", old.mesh == new.mesh);
    keep("the address", old.address == new.address);
    keep("the admin socket", old.socket == new.socket);
    keep("the cache", old.cache == new.cache);
    keep("whether there is a registry", old.registry.is_some() == new.registry.is_some());
    new.interface.clone_from(&old.interface);
    new.key.clone_from(&old.key);
    new.mesh = old.mesh;
    new.address = old.address;
    new.socket.clone_from(&old.socket);
    new.cache.clone_from(&old.cache);
    if old.registry.is_some() != new.registry.is_some() {
        new.registry.clone_from(&old.registry);
    }
    kept
}
