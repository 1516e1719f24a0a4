//! How sources are merged: protocols/kcrypt.md §10.2.
//!
//! A later source wins; lists are united; an explicit null clears; a text over a list or the other way round is an error.
//! What the kernel command line says replaces.

use std::collections::BTreeMap;

use crate::error::{ConfigError, Place};
use crate::keys::{self, CONFIG_URL, MESH};
use crate::layer::{Change, Layer, Statement, Unknown};
use crate::mesh::value::Kind as AgentKind;
use crate::value::{Kind, Setting, Unread};

/// Settings by dotted key, each with the place that set it last.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    leaves: BTreeMap<&'static str, (Setting, Place)>,
    mesh: Option<Place>,
    unknown_in_mesh: Vec<Unknown>,
}

impl Settings {
    /// Merges one source over what is there.
    pub(crate) fn merge(&mut self, layer: &Layer) -> Result<(), ConfigError> {
        self.unknown_in_mesh.extend(layer.unknown_in_mesh.iter().cloned());
        layer.statements.iter().try_for_each(|statement| self.apply(statement.clone()))
    }

    /// Puts one source in the place of what is there, as far as it says something.
    pub(crate) fn overrule(&mut self, layer: &Layer) -> Result<(), ConfigError> {
        for Statement { key, .. } in &layer.statements {
            self.leaves.remove(key);
            if let Some(twin) = keys::twin(key) {
                self.leaves.remove(twin.as_str());
            }
        }
        self.merge(layer)
    }

    pub(crate) fn get(&self, key: &str) -> Option<(&Setting, &Place)> {
        self.leaves.get(key).map(|(setting, place)| (setting, place))
    }

    /// Where the mesh was asked for, be it with an empty mapping.
    pub(crate) fn mesh(&self) -> Option<&Place> {
        self.mesh.as_ref()
    }

    pub(crate) fn unknown_in_mesh(&self) -> &[Unknown] {
        &self.unknown_in_mesh
    }

    /// What the agent has to read, each with what the sources say of it.
    pub(crate) fn unread(&self) -> impl Iterator<Item = (&'static str, AgentKind, &[Unread])> {
        self.leaves.iter().filter_map(|(key, (setting, _))| match (keys::leaf(key), setting) {
            (Some((key, Kind::Agent(kind))), Setting::Unread(values)) => {
                Some((key, kind, values.as_slice()))
            }
            _ => None,
        })
    }

    pub(crate) fn apply(
        &mut self,
        Statement { key, change, place }: Statement,
    ) -> Result<(), ConfigError> {
        match change {
            Change::Set(_) if key == CONFIG_URL => {} // of its own source only
            Change::Set(setting) => {
                let merged = match self.leaves.remove(key) {
                    Some((known, first)) => merged(key, known, first, setting, &place)?,
                    None => once(setting),
                };
                if self.mesh.is_none() && key.starts_with(MESH) {
                    self.mesh = Some(place.clone());
                }
                self.leaves.insert(key, (merged, place));
            }
            Change::Open => self.mesh = Some(place),
            Change::Clear => self.clear(key, &place),
        }
        Ok(())
    }

    fn clear(&mut self, path: &str, place: &Place) {
        let below = |key: &str| {
            key.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let before = self.leaves.len();
        self.leaves.retain(|key, _| !below(key));
        if below(MESH) {
            self.mesh = None;
        }
        if self.leaves.len() < before {
            log::warn!("{place}: {path} is empty here and clears what earlier files say");
        }
    }
}

fn merged(
    key: &str,
    known: Setting,
    first: Place,
    setting: Setting,
    place: &Place,
) -> Result<Setting, ConfigError> {
    if known.kind() != setting.kind() {
        return Err(ConfigError::Merge {
            key: key.to_owned(),
            first,
            known: known.kind(),
            second: place.clone(),
            found: setting.kind(),
        });
    }
    Ok(match (known, setting) {
        (Setting::List(known), Setting::List(more)) => {
            once(Setting::List(known.into_iter().chain(more).collect()))
        }
        (Setting::Pcrs(known), Setting::Pcrs(more)) => {
            let mut both: Vec<u8> = known.into_iter().chain(more).collect();
            both.sort_unstable();
            both.dedup();
            Setting::Pcrs(both)
        }
        (Setting::Unread(known), Setting::Unread(more)) => {
            Setting::Unread(known.into_iter().chain(more).collect())
        }
        (
            Setting::Registry { urls: known, is_list: true },
            Setting::Registry { urls: more, is_list },
        ) => once(Setting::Registry { urls: known.into_iter().chain(more).collect(), is_list }),
        (_, setting) => setting,
    })
}

/// A list with each of its texts once, where it stands first.
fn once(setting: Setting) -> Setting {
    match setting {
        Setting::List(texts) => Setting::List(distinct(texts)),
        Setting::Registry { urls, is_list } => Setting::Registry { urls: distinct(urls), is_list },
        _ => setting,
    }
}

fn distinct<T: PartialEq>(items: Vec<T>) -> Vec<T> {
    let mut once = Vec::with_capacity(items.len());
    for item in items {
        if !once.contains(&item) {
            once.push(item);
        }
    }
    once
}
