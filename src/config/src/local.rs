//! The configuration that this machine has by itself, and what `config_url` adds to it (protocols/kcrypt.md §10.2).
//!
//! Two steps, because the first may need a file system that must not stay mounted and the second a network that takes its
//! time. Kairos ignores whatever fails here, and so may choose a weaker mode than its operator did; see [`Local::fetch`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use crate::error::{ConfigError, Place};
use crate::files::{self, Source};
use crate::keys::{CERTIFICATE, CONFIG_URL, SERVERS};
use crate::layer::Layer;
use crate::mesh::{self, Membership};
use crate::settings::Settings;
use crate::value::Setting;
use crate::{Config, config_of, deadline_of};

/// A document that names a document that names a document.
const MAX_DEPTH: usize = 4;
/// Documents fetched in all; each has the bound of a file.
const MAX_DOCUMENTS: usize = 8;

/// What is asked of whoever has the network.
#[derive(Debug, Clone, Copy)]
pub struct Request<'r> {
    /// http or https.
    pub url: &'r str,
    /// Certificates to trust beside the system's: PEM text from the local files.
    pub certificate: Option<&'r str>,
    /// Longest answer.
    pub max_bytes: usize,
}

/// Gets a document, or says in words why not. It bounds its own time.
pub type Fetch<'f> = dyn FnMut(&Request<'_>) -> Result<Vec<u8>, String> + 'f;

/// The cloud-config files and the kernel command line, read and found in order.
#[derive(Debug)]
pub struct Local {
    files: Vec<(PathBuf, Layer)>,
    cmdline: Layer,
    settings: Settings,
    roots: Vec<PathBuf>,
}

impl Local {
    /// Reads the cloud-config files below `dirs`, in this order, and the kernel command line over them. Certificates are
    /// read from their files; no file is needed afterwards.
    ///
    /// # Errors
    /// See [`ConfigError`]; nothing is silently left out.
    pub fn read(dirs: &[&Path], cmdline: &str) -> Result<Self, ConfigError> {
        let roots: Vec<PathBuf> = dirs.iter().map(|dir| dir.to_path_buf()).collect();
        let mut sources = Vec::new();
        for dir in dirs {
            sources.extend(files::read_all(dir)?);
        }
        Self::merged(sources, cmdline, &roots)
    }

    /// As [`Local::read`] of files that are in memory; what has no header is left out.
    ///
    /// # Errors
    /// As [`Local::read`].
    pub fn of_bytes(files: Vec<(PathBuf, Vec<u8>)>, cmdline: &str) -> Result<Self, ConfigError> {
        let mut sources = Vec::new();
        for (path, bytes) in files {
            sources.extend(Source::of_bytes(path, bytes)?);
        }
        Self::merged(sources, cmdline, &[])
    }

    fn merged(sources: Vec<Source>, cmdline: &str, roots: &[PathBuf]) -> Result<Self, ConfigError> {
        let mut files = Vec::new();
        for source in sources {
            let layer = Layer::of_yaml(&source, roots)?;
            files.push((source.path, layer));
        }
        let cmdline = Layer::of_cmdline(cmdline, roots)?;
        let mut settings = Settings::default();
        for (_, layer) in &files {
            settings.merge(layer)?;
        }
        settings.overrule(&cmdline)?;
        Ok(Self { files, cmdline, settings, roots: roots.to_vec() })
    }

    /// Whether anything names a `config_url`.
    #[must_use]
    pub fn names_config_url(&self) -> bool {
        self.layers().any(|layer| layer.config_url().is_some())
    }

    /// Whether these sources say where the passphrase comes from: a key server, or that there is none.
    #[must_use]
    pub fn knows_mode(&self) -> bool {
        self.settings.get(SERVERS).is_some()
    }

    /// What the machine knows by itself. For a caller that has no use for the rest: which server is asked and which
    /// volumes there are may stand behind the `config_url`.
    ///
    /// # Errors
    /// As [`Local::read`].
    pub fn alone(self) -> Result<Config, ConfigError> {
        let sources = self.files.into_iter().map(|(path, _)| path).collect();
        config_of(&self.settings, sources, Vec::new())
    }

    /// The deadline that the local sources set.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        deadline_of(&self.settings)
    }

    /// The mesh that the local sources describe, with all that makes this machine a member: what [`Config`] leaves out is
    /// read and checked here.
    ///
    /// # Errors
    /// As [`Local::read`].
    pub fn membership(&self) -> Result<Option<Membership>, ConfigError> {
        mesh::membership(&self.settings, &self.roots)
    }

    /// The configuration with every `config_url` followed: each document is merged over the source that names it, and
    /// the command line's own keys over all.
    ///
    /// What cannot be had is left out and listed in [`Config::unfetched`], if a key server is configured without it, or
    /// if `challenger_server: ""` says that there is none. Else nobody can say which mode is meant.
    ///
    /// # Errors
    /// As [`Local::read`], also of what was fetched, and [`ConfigError::NotFetched`].
    pub fn fetch(self, fetch: &mut Fetch<'_>) -> Result<Config, ConfigError> {
        if !self.names_config_url() {
            return self.alone();
        }
        let certificate = match self.settings.get(CERTIFICATE) {
            Some((Setting::Text(pem), _)) if !pem.is_empty() => Some(pem.as_str()),
            _ => None,
        };
        let mut documents = Documents {
            fetch,
            certificate,
            known: HashMap::new(),
            read: Vec::new(),
            failures: Vec::new(),
        };
        let mut settings = Settings::default();
        let mut sources = Vec::new();
        for (path, layer) in &self.files {
            settings.merge(layer)?;
            sources.push(path.clone());
            documents.follow(layer, &mut settings, &mut Vec::new())?;
            sources.append(&mut documents.read);
        }
        documents.follow(&self.cmdline, &mut settings, &mut Vec::new())?;
        settings.overrule(&self.cmdline)?;
        let Documents { read, failures, .. } = documents;
        sources.extend(read);
        settle(settings, sources, failures)
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.files.iter().map(|(_, layer)| layer).chain([&self.cmdline])
    }
}

/// A document that could not be had.
struct Failure {
    url: String,
    place: Place,
    why: String,
}

/// What has been fetched so far.
struct Documents<'d, 'f> {
    fetch: &'d mut Fetch<'f>,
    certificate: Option<&'d str>,
    /// By URL; `None` if it could not be had. The same file is often in more than one directory.
    known: HashMap<String, Option<Rc<Layer>>>,
    read: Vec<PathBuf>,
    failures: Vec<Failure>,
}

impl Documents<'_, '_> {
    /// Merges the document that `layer` names, and what that names in turn; `chain` has the URLs that led here.
    fn follow(
        &mut self,
        layer: &Layer,
        settings: &mut Settings,
        chain: &mut Vec<String>,
    ) -> Result<(), ConfigError> {
        let Some((url, place)) = layer.config_url() else { return Ok(()) };
        // A whole configuration that also says where it is from.
        if chain.iter().any(|known| known == url) {
            return Ok(());
        }
        if chain.len() >= MAX_DEPTH {
            self.fail(url, place, format!("more than {MAX_DEPTH} documents name one another"));
            return Ok(());
        }
        let document = match self.known.get(url) {
            Some(known) => known.clone(),
            None => {
                let document = self.get(url, place)?.map(Rc::new);
                self.known.insert(url.to_owned(), document.clone());
                document
            }
        };
        let Some(document) = document else { return Ok(()) };
        settings.merge(&document)?;
        chain.push(url.to_owned());
        self.follow(&document, settings, chain)
    }

    fn get(&mut self, url: &str, place: &Place) -> Result<Option<Layer>, ConfigError> {
        if self.known.len() >= MAX_DOCUMENTS {
            self.fail(url, place, format!("{MAX_DOCUMENTS} documents are fetched at most"));
            return Ok(None);
        }
        if url.contains("{{") {
            self.fail(url, place, "templates are not evaluated here; write the URL out".to_owned());
            return Ok(None);
        }
        let request =
            Request { url, certificate: self.certificate, max_bytes: files::MAX_FILE_BYTES };
        let bytes = match (self.fetch)(&request) {
            Ok(bytes) if bytes.len() <= files::MAX_FILE_BYTES => bytes,
            Ok(_) => {
                self.fail(url, place, format!("more than {} bytes", files::MAX_FILE_BYTES));
                return Ok(None);
            }
            Err(why) => {
                self.fail(url, place, why);
                return Ok(None);
            }
        };
        let path = PathBuf::from(shown(url));
        let Some(source) = Source::of_bytes(path.clone(), bytes)? else {
            // A captive portal's page, or what somebody's web server says instead of 404.
            let why = "the answer has no #cloud-config in its first lines".to_owned();
            self.fail(url, place, why);
            return Ok(None);
        };
        log::info!("{place}: {CONFIG_URL}: fetched {}", path.display());
        self.read.push(path);
        Layer::of_yaml(&source, &[]).map(Some)
    }

    fn fail(&mut self, url: &str, place: &Place, why: String) {
        self.failures.push(Failure { url: shown(url), place: place.clone(), why });
    }
}

/// A URL without its query, which may hold a token.
fn shown(url: &str) -> String {
    match url.split_once('?') {
        Some((path, _)) => format!("{path}?..."),
        None => url.to_owned(),
    }
}

/// The configuration without what could not be had, if that leaves no doubt about the mode.
fn settle(
    settings: Settings,
    sources: Vec<PathBuf>,
    failures: Vec<Failure>,
) -> Result<Config, ConfigError> {
    let decided = settings.get(SERVERS).is_some();
    let mut unfetched = Vec::new();
    for Failure { url, place, why } in failures {
        if !decided {
            return Err(ConfigError::NotFetched { place, url, why });
        }
        log::warn!("{place}: {CONFIG_URL}: {url}: {why}; going on with what the local files say");
        unfetched.push(format!("{url}: {why}"));
    }
    config_of(&settings, sources, unfetched)
}
