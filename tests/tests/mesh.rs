//! Whole meshes in network namespaces: real agents, real WireGuard by wireguard-go, a real nats-server that permits each node
//! no more than protocols/ikto-kilo.md §1.6 says.

use std::{env, path::PathBuf};

use latchkey_tests::{error::Result, mesh::Mesh};

/// An installed `ikto` that the tests of living side by side run with; without one they are skipped, and say so.
fn ikto() -> Option<PathBuf> {
    let ikto = env::var_os("LATCHKEY_TEST_IKTO").map(PathBuf::from);
    if ikto.is_none() {
        eprintln!("skipped: LATCHKEY_TEST_IKTO names no ikto program");
    }
    ikto
}

/// The harness itself is right about what a mesh is.
#[test]
fn ikto_by_itself() -> Result<()> {
    let Some(ikto) = ikto() else { return Ok(()) };
    let mesh = Mesh::new("ikto", 2)?;
    for host in &mesh.hosts {
        host.set("nats_creds", "/dev/null");
        host.start_wireguard_go()?;
        host.start_program(&ikto)?;
    }
    mesh.connected()?;
    let stream = mesh.hosts[0].stream_to(&mesh.hosts[1])?;
    stream.flows(100)?;
    assert_eq!(stream.finish()?.lost.len(), 0);
    Ok(())
}
