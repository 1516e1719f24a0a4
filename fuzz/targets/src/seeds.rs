//! Where the search begins: the project's vectors, and a well-formed input of each kind that they do not have.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::SECRET;

const VECTORS: &str = include_str!("../../../tests/vectors/kcrypt.json");
const WHOLE: &str = "
install:
  auto: true
  encrypted_partitions: [COS_OEM, COS_PERSISTENT]
kcrypt:
  nv_index: &nv \"0x1500001\"
  challenger:
    challenger_server: ['https://kms.local:8443/base', 'http://[fd00::1]:8082']
    mdns: true
    nv_index: *nv
    c_index: 0x81000009
    tpm_device: /dev/tpmrm1
    certificate: |
      -----BEGIN CERTIFICATE-----
      MIIBszCCAVmgAwIBAgIU
      -----END CERTIFICATE-----
latchkey:
  deadline: 1m30s
  protocol: auto
  pcrs: [0, 7, 11]
  mapper: label
  mesh:
    network: fleet-a
    prefix: fd10::/16
    port: 51821
    interface: wg-fleet
    name: node-17
    registry: ['tls://nats-1.example.org', 'nats://[fd00::1]:4333/']
    credentials: |
      -----BEGIN NATS USER JWT-----
      eyJ0
      ------END NATS USER JWT------
      -----BEGIN USER NKEY SEED-----
      SUAB
      ------END USER NKEY SEED------
    bucket: fleet-a
    registry_ca: /oem/ca.pem
    registry_certificate: /oem/node.pem
    registry_key: |
      -----BEGIN PRIVATE KEY-----
      MC4C
      -----END PRIVATE KEY-----
    advertise_address: node.example.org
    keepalive: 25
    mtu: 1420
    signatures: prefer
    metrics: '[::1]:9586'
";
/// As wireguard-go tells of a device with two peers.
const UAPI: &str = "\
private_key=0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f60
listen_port=51820
public_key=ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff
preshared_key=0000000000000000000000000000000000000000000000000000000000000000
protocol_version=1
endpoint=[fe80::1%eth0]:51820
last_handshake_time_sec=1800000000
last_handshake_time_nsec=5
tx_bytes=4
rx_bytes=3
persistent_keepalive_interval=25
allowed_ip=fd10:aaaa:1::/48
allowed_ip=10.0.0.0/24
public_key=eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee
errno=0

";
/// As `ikto init` prints it, filled in, and with what Ikto does not know.
const IKTO: &str = r#"{
  "name": "node-A",
  "advertise_address": "10.99.1.2",
  "private_address": "fd10:aaaa:1::",
  "subnet_prefix": 48,
  "mesh_cidr": "fd10::/16",
  "wg_dev_name": "wg-ikto",
  "wg_port": 51820,
  "private_key_path": "/etc/ikto/key",
  "nats_creds": "$HOME/${X}/~.creds",
  "nats_url": "nats://user:p%40ss@nats,tls://[::1]:4333/,nats://",
  "nats_kv": "ikto-mesh",
  "signatures": "require",
  "strict": false,
  "persistent_keepalive": 25,
  "mtu": 1380,
  "nats_ca": "~/ca.pem",
  "nats_cert": "c",
  "nats_key": "k",
  "nats-url": [null, {"a": 1.5e9}]
}"#;
const CMDLINE: &str = r#"BOOT_IMAGE=(hd0,gpt3)/boot/vmlinuz console=tty1 root=live:CDLABEL=COS_LIVE rd.live.dir=/ 8250.nr_uarts=1 3 a\ b dyndbg="file a.c +p" x='y z' kairos.config=kcrypt.challenger.mdns=true kcrypt.challenger.challenger_server=http://kms.local:8082 latchkey.pcrs=0,7 kairos.config_url=https://x/y"#;
const MANIFESTS: &str = "apiVersion: keyserver.kairos.io/v1alpha1
kind: SealedVolume
metadata:
  name: node-1
  namespace: default
  creationTimestamp: \"2026-01-01T00:00:00Z\"
spec:
  TPMHash: 187c624e06113ed470275dd1ab94f595d41aeae89e8fcf740bb1a3b0b62c691c
  partitions:
    - label: COS_PERSISTENT
      secret:
        name: node-1-cos-persistent
        path: passphrase
  quarantined: false
  attestation:
    ekPublicKey: |
      -----BEGIN PUBLIC KEY-----
      MIIB
      -----END PUBLIC KEY-----
    pcrValues:
      pcrs: {\"0\": ab, \"7\": \"\", \"11\": cd}
---
# a comment
apiVersion: v1
kind: Secret
metadata: {name: node-1-cos-persistent, labels: {kcrypt.kairos.io/tpm-hash: 187c}}
type: Opaque
data:
  passphrase: Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5
stringData:
  generated_by: tpm
";
/// LUKS2 metadata (LUKS2 On-Disk Format 1.1.1 §3) as cryptsetup writes it, with a token of ours.
const LUKS: &str = r#"{"keyslots":{"0":{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},"area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64},"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"AAAA"}}},"tokens":{"0":{"type":"latchkey","keyslots":["0"],"version":1,"unlock":"offline","mac":"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f","next":"2","unfinished":{"copy":"1056964608","size":"16777216"}}},"segments":{},"digests":{},"config":{"json_size":"12288","keyslots_size":"16744448"}}"#;

/// The seeds of a target.
///
/// # Panics
/// If the vectors are not as they were.
#[must_use]
pub fn of(target: &str) -> Vec<Vec<u8>> {
    let vectors: Value = serde_json::from_str(VECTORS).unwrap();
    let quotes =
        ["quote_empty_nonce", "quote_nonce_is_secret", "MUST_REJECT_quote_selection_reorder"];
    let secret = STANDARD.encode(SECRET);
    let texts: Vec<String> = match target {
        "v1_token" => vec![
            text(&vectors["v1_authorization"]),
            vectors["v1_token_json"].to_string(),
            "Bearer TPM".to_owned(),
        ],
        "v1_message" => vec![
            vectors["software_ek"]["challenge_v1"].to_string(),
            json!({"Secret": secret}).to_string(),
            json!({"passphrase": SECRET, "error": "", "generated_by": ""}).to_string(),
            json!({"passphrase": "AAAA_-", "error": "", "generated_by": "tpm"}).to_string(),
            json!({"passphrase": null, "Error": "No secret found for x"}).to_string(),
        ],
        "v2_message" => {
            let proofs = quotes.map(|quote| {
                json!({"secret": secret, "pcr_quote": vectors[quote]}).to_string()
            });
            let rest = [
                vectors["v2_init"].to_string(),
                vectors["software_ek"]["challenge_v2"].to_string(),
                vectors[quotes[0]].to_string(),
                json!({"passphrase": secret}).to_string(),
                json!({"error": "quarantined: x <&>", "generated_by": "tpm"}).to_string(),
            ];
            proofs.into_iter().chain(rest).collect()
        }
        "plugin_event" => {
            let flat = json!({"name": "sda3", "label": "persistent", "uuid": "unknown", "type": "crypto_LUKS", "filesystem_label": "COS_PERSISTENT"});
            let nested = json!({"partition": {"name": "sda3", "label": "COS_PERSISTENT", "fs": "crypto_LUKS", "size": 5}, "challenger_server": "https://x", "mdns": true});
            let event = json!({"name": "discovery.password", "data": nested.to_string(), "file": ""});
            let answer = json!({"state": "", "data": SECRET, "error": "", "log": "x"});
            [flat, nested, event, answer].iter().map(Value::to_string).collect()
        }
        "tpm_structure" => return structures(&vectors, &quotes),
        "ek" => {
            let spki = STANDARD.decode(text(&vectors["ek_spki_b64"])).unwrap();
            return vec![spki, text(&vectors["ek_pem"]).into(), text(&vectors["pubhash"]).into()];
        }
        "cloud_config" => vec![
            WHOLE.to_owned(),
            "latchkey: {mesh: {network: n, prefix: 10.0.0.0/8, registry: 'nats://u:p%40ss@n', advertise_interface: eth0, keepalive: off}}".to_owned(),
            "%40x@nats:4222".to_owned(),
            "config_url: http://x/2\nkcrypt: ~\nlatchkey: {<<: {deadline: 5s}}".to_owned(),
        ],
        "ikto" => vec![
            IKTO.to_owned(),
            r#"{"mesh_cidr":"10.64.0.0/10","private_address":"::ffff:10.70.172.0","Subnet_Prefix":24,"advertise_address":"n","WG_DEV_NAME":"w","wg_port":1,"private_key_path":"k","nats_kv":"b"}"#.to_owned(),
            "null".to_owned(),
            "@nats:4222".to_owned(),
        ],
        "cmdline" => vec![CMDLINE.to_owned(), "root=LABEL=COS_ACTIVE kcrypt.nv_index=1".to_owned()],
        "manifest" => vec![MANIFESTS.to_owned()],
        "disk" => return disks(),
        "luks_token" => vec![LUKS.to_owned()],
        "identity" => vec![
            json!({"version": 1, "network": "fleet", "private_key": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEA=", "volume": "85c39d0f-4867-5227-8334-f5eec606d9eb"}).to_string(),
            json!({"version": 1, "private_key": SECRET}).to_string(),
        ],
        "timeline" => vec![
            json!({"version": 1, "boot_id": "x", "outcome": "unlocked", "mode": "online", "reason": "y", "steps": [{"name": "start", "at_ms": 5, "took_ms": 7}]}).to_string(),
        ],
        "dns" => return answers(),
        "mdns" => return questions(),
        "http" => vec![
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello".to_owned(),
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n".to_owned(),
            "HTTP/1.0 302 Found\r\nLocation: http://y/\r\n\r\n".to_owned(),
        ],
        "member" => vec![
            r#"{"name":"node-A","public_key":"WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=","advertise_address":"10.99.1.2","allowed_ip":"fd10:aaaa:1::/48","wg_port":51820}"#.to_owned(),
            r#"{"NAME":null,"public_key":"WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=","advertise_address":"a.example.org","allowed_ip":"10.70.172.0/24","version":1,"capabilities":["x"],"signature":"AAAA","more":{"signature":[]},"name":"\ud800\u003c"}"#.to_owned(),
            r#"{"private_cidr":"fd10::/48","public_key":"WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE="}"#.to_owned(),
            crate::member::signed().1,
            crate::member::signed().0,
        ],
        "uapi" => vec![UAPI.to_owned(), "errno=-22\n\n".to_owned(), format!("x={SECRET}\nlisten_port={SECRET}\n\n")],
        other => panic!("no seeds for {other}"),
    };
    texts.into_iter().map(String::into_bytes).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn structures(vectors: &Value, quotes: &[&str]) -> Vec<Vec<u8>> {
    let keys = ["Public", "CreateData", "CreateAttestation", "CreateSignature"];
    let creation = keys.iter().map(|key| &vectors["ak_params_v2"][key]);
    let signed = quotes.iter().map(|quote| &vectors[quote]["quote"]);
    let quoted = signed.flat_map(|signed| [&signed["quote"], &signed["signature"]]);
    let mut structures: Vec<Vec<u8>> =
        creation.chain(quoted).map(|value| STANDARD.decode(text(value)).unwrap()).collect();
    let challenge = &vectors["software_ek"]["challenge_v2"]["challenge"];
    let part = |key: &str| STANDARD.decode(text(&challenge[key])).unwrap();
    structures.push([part("Credential"), part("Secret")].concat());
    structures
}

/// Of each kind of content the first bytes, after the number of the place where they are.
fn disks() -> Vec<Vec<u8>> {
    let padded = |parts: &[(usize, &[u8])]| {
        let mut bytes = vec![0; parts.iter().map(|(at, part)| at + part.len()).max().unwrap_or(0)];
        for (at, part) in parts {
            bytes[*at..*at + part.len()].copy_from_slice(part);
        }
        bytes
    };
    let uuid = b"85c39d0f-4867-5227-8334-f5eec606d9eb\0\0\0\0";
    let luks = padded(&[(1, b"LUKS\xba\xbe\0\x02"), (25, b"COS_PERSISTENT"), (169, uuid)]);
    let ext =
        padded(&[(0, b"\x02"), (1 + 56, b"\x53\xef"), (1 + 120, b"COS_OEM\x1b[2J\0\0\0\0\0")]);
    let iso = padded(&[(0, b"\x03"), (2, b"CD001"), (1 + 0x28, &[b'x'; 32])]);
    let xfs = padded(&[(1, b"XFSB"), (109, b"COS_PERSISTE")]);
    vec![luks, ext, iso, xfs]
}

/// An address, an alias of it with a compressed name, and what an mDNS responder says of a service.
fn answers() -> Vec<Vec<u8>> {
    let header =
        |questions: u8, answers: u8| vec![0, 7, 0x84, 0, 0, questions, 0, answers, 0, 0, 0, 0];
    let name = b"\x03kms\x05local\x00";
    let record = |owner: &[u8], kind: u8, data: &[u8]| {
        let length = u8::try_from(data.len()).unwrap();
        [owner, &[0, kind, 0x80, 1, 0, 0, 0, 120, 0, length], data].concat()
    };
    let pointer = [0xc0, 12];
    let address = record(&pointer, 1, &[10, 0, 2, 2]);
    let address6 = record(&pointer, 28, &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let alias = record(&pointer, 5, b"\x01a\xc0\x10");
    let service = b"\x07_kcrypt\x04_tcp\x05local\x00";
    let instance = record(service, 12, b"\x01x\xc0\x0c");
    let port = record(b"\x01x\xc0\x0c", 33, b"\0\0\0\0\x1f\x92\x03kms\xc0\x19");
    let asked = [name.as_slice(), &[0, 1, 0, 1]].concat();
    vec![
        [header(1, 2), asked.clone(), address.clone(), address6].concat(),
        [header(1, 2), asked, alias, address].concat(),
        [header(0, 2), instance, port].concat(),
        b"kms.example.org".to_vec(),
    ]
}

/// What Kairos' client asks for, both at once, and a packet of a host that has our name.
fn questions() -> Vec<Vec<u8>> {
    let header = |flags: u8, questions: u8, answers: u8| {
        vec![0, 0, flags, 0, 0, questions, 0, answers, 0, 0, 0, 0]
    };
    let service = b"\x07_kcrypt\x04_tcp\x05local\x00\0\x0c\x80\x01";
    let host = b"\x03kms\x05local\x00\0\xff\0\x01";
    let theirs = b"\x03kms\x05local\x00\0\x01\x80\x01\0\0\0\x78\0\x04\xc0\0\x02\x63";
    vec![
        [header(0, 1, 0), service.to_vec()].concat(),
        [header(0, 2, 0), service.to_vec(), host.to_vec()].concat(),
        [header(0, 2, 0), host.to_vec(), b"\xc0\x0c\0\x1c\0\x01".to_vec()].concat(),
        [header(0x84, 0, 1), theirs.to_vec()].concat(),
    ]
}
