//! What the responder says: a pure function from a received packet to the answer (RFC 6762 §6, RFC 6763, `protocols/kcrypt.md`
//! §10.6).
//!
//! Packets come from whoever is on the link. They are bounded before they are parsed, and whatever is in them, an answer holds
//! only our own records.

use std::net::IpAddr;

use simple_dns::{
    CLASS, Name, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, Question, ResourceRecord, TYPE,
    rdata::{A, AAAA, PTR, RData, SRV, TXT},
};

/// RFC 6762 §17.
pub const MAX_PACKET: usize = 9000;
/// Most records of all kinds in a packet that is looked at.
const MAX_RECORDS: usize = 256;

/// The service that Kairos' client asks for.
const SERVICE: &str = "_kcrypt._tcp.local";
/// What lists services (RFC 6763 §9).
const SERVICES: &str = "_services._dns-sd._udp.local";

/// Seconds for which an answer may be kept. Short for all: a machine that boots keeps none, and the server may move.
const TTL: u32 = 120;
/// And by a querier that knows nothing of mDNS (RFC 6762 §6.7).
const LEGACY_TTL: u32 = 10;
/// The port that queriers of mDNS send from.
const PORT: u16 = 5353;

/// Why a name cannot be announced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name for mDNS: letters, digits and '-' in labels of up to 63, and .local at its end"
)]
pub struct NotLocal(String);

/// A packet that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a packet of mDNS: {0}")]
pub struct Malformed(String);

/// What is announced: a key server on a host.
#[derive(Debug, Clone)]
pub struct Service {
    host: Name<'static>,
    instance: Name<'static>,
    port: u16,
}

/// What comes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Nothing for us.
    Nothing,
    /// This is to be sent to everybody on the link.
    ForAll(Vec<u8>),
    /// This is to be sent to the asker alone.
    ForAsker(Vec<u8>),
    /// Somebody else has our name, with this address.
    Conflict(IpAddr),
}

impl Service {
    /// A key server under this name.
    ///
    /// # Errors
    /// [`NotLocal`] if the name is not of mDNS.
    pub fn new(host: &str, port: u16) -> Result<Self, NotLocal> {
        let refused = || NotLocal(host.to_owned());
        let plain = host.strip_suffix('.').unwrap_or(host);
        let labels: Vec<&str> = plain.split('.').collect();
        let usable = |label: &&str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        let (last, first) = (labels.last().copied(), labels.first().copied());
        let is_local = last.is_some_and(|label| label.eq_ignore_ascii_case("local"));
        if labels.len() < 2 || !is_local || !labels.iter().all(usable) {
            return Err(refused());
        }
        let instance = format!("{}.{SERVICE}", first.unwrap_or_default());
        let name = |text: &str| Name::new(text).map(Name::into_owned).map_err(|_| refused());
        Ok(Self { host: name(plain)?, instance: name(&instance)?, port })
    }

    /// What is said unasked at the start, and with `alive` unset at the end.
    ///
    /// # Errors
    /// [`Malformed`] if there are more addresses than a packet holds.
    pub fn announcement(&self, addresses: &[IpAddr], alive: bool) -> Result<Vec<u8>, Malformed> {
        let mut packet = reply(0);
        packet.answers = self.records(addresses);
        for record in &mut packet.answers {
            record.ttl = if alive { TTL } else { 0 };
        }
        packed(&packet)
    }

    /// The question whether anybody has the name already (RFC 6762 §8.1).
    ///
    /// # Errors
    /// None in practice: the question is short.
    pub fn probe(&self) -> Result<Vec<u8>, Malformed> {
        let mut packet = Packet::new_query(0);
        let any = QCLASS::CLASS(CLASS::IN);
        packet.questions.push(Question::new(self.host.clone(), QTYPE::ANY, any, true));
        packed(&packet)
    }

    /// What comes of a packet that was heard on an interface with these `addresses`; `own` are those of all interfaces.
    ///
    /// # Errors
    /// [`Malformed`], of which nothing needs to come.
    pub fn hear(
        &self,
        message: &[u8],
        from_port: u16,
        addresses: &[IpAddr],
        own: &[IpAddr],
    ) -> Result<Heard, Malformed> {
        let packet = parsed(message)?;
        if packet.opcode() != OPCODE::StandardQuery {
            return Ok(Heard::Nothing);
        }
        if packet.has_flags(PacketFlag::RESPONSE) {
            return Ok(self.conflict(&packet, own));
        }
        let all = self.records(addresses);
        let asked = |record: &&ResourceRecord<'_>| {
            packet.questions.iter().any(|question| {
                question.qname == record.name
                    && record.match_qclass(question.qclass)
                    && matches(question.qtype, record)
            })
        };
        let known = |record: &ResourceRecord<'_>| {
            packet.answers.iter().any(|known| {
                known.name == record.name
                    && known.rdata == record.rdata
                    && known.ttl >= record.ttl / 2
            })
        };
        let is_legacy = from_port != PORT;
        let mut answer = reply(if is_legacy { packet.id() } else { 0 });
        answer.answers =
            all.iter().filter(asked).filter(|record| !known(record)).cloned().collect();
        if answer.answers.is_empty() {
            return Ok(Heard::Nothing);
        }
        // Who asks for one of them wants all: Kairos' client takes a server only when it has seen SRV, TXT and an address.
        answer.additional_records = all
            .iter()
            .filter(|record| record.name != services() && !answer.answers.contains(record))
            .cloned()
            .collect();
        if is_legacy {
            // As a name server of old would answer (RFC 6762 §6.7).
            let ours = |question: &&Question<'_>| all.iter().any(|r| r.name == question.qname);
            answer.questions = packet.questions.iter().filter(ours).cloned().collect();
            for record in answer.answers.iter_mut().chain(&mut answer.additional_records) {
                record.ttl = LEGACY_TTL;
                record.cache_flush = false;
            }
        }
        let bytes = packed(&answer)?;
        let is_alone =
            is_legacy || packet.questions.iter().all(|question| question.unicast_response);
        Ok(if is_alone { Heard::ForAsker(bytes) } else { Heard::ForAll(bytes) })
    }

    /// Whether a response gives our host an address that is none of ours.
    fn conflict(&self, packet: &Packet<'_>, own: &[IpAddr]) -> Heard {
        let records = packet.answers.iter().chain(&packet.additional_records);
        records
            .filter(|record| record.name == self.host && record.ttl > 0)
            .filter_map(|record| match &record.rdata {
                RData::A(a) => Some(IpAddr::from(a.address.to_be_bytes())),
                RData::AAAA(aaaa) => Some(IpAddr::from(aaaa.address.to_be_bytes())),
                _ => None,
            })
            .find(|address| !own.contains(address))
            .map_or(Heard::Nothing, Heard::Conflict)
    }

    /// All our records: the pointer to the service, the service, its text, the host's addresses.
    fn records(&self, addresses: &[IpAddr]) -> Vec<ResourceRecord<'static>> {
        let service = Name::new_unchecked(SERVICE);
        let shared =
            |name: &Name<'static>, data| ResourceRecord::new(name.clone(), CLASS::IN, TTL, data);
        let unique = |name, data| shared(name, data).with_cache_flush(true);
        let target = SRV { priority: 0, weight: 0, port: self.port, target: self.host.clone() };
        // A TXT record has at least one string (RFC 6763 §6.1).
        let text = TXT::new().with_string("txtvers=1").unwrap_or_default();
        let mut records = vec![
            shared(&service, RData::PTR(PTR(self.instance.clone()))),
            shared(&services(), RData::PTR(PTR(service.clone()))),
            unique(&self.instance, RData::SRV(target)),
            unique(&self.instance, RData::TXT(text)),
        ];
        records.extend(addresses.iter().map(|address| {
            let data = match address {
                IpAddr::V4(v4) => RData::A(A::from(*v4)),
                IpAddr::V6(v6) => RData::AAAA(AAAA::from(*v6)),
            };
            unique(&self.host, data)
        }));
        records
    }
}

fn services() -> Name<'static> {
    Name::new_unchecked(SERVICES)
}

/// Whether a question of this type is about this record; of the meta-types only ANY is of mDNS.
fn matches(wanted: QTYPE, record: &ResourceRecord<'_>) -> bool {
    matches!(
        wanted,
        QTYPE::ANY | QTYPE::TYPE(TYPE::A | TYPE::AAAA | TYPE::PTR | TYPE::SRV | TYPE::TXT)
    ) && record.match_qtype(wanted)
}

fn reply(id: u16) -> Packet<'static> {
    let mut packet = Packet::new_reply(id);
    packet.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    packet
}

fn packed(packet: &Packet<'_>) -> Result<Vec<u8>, Malformed> {
    let bytes =
        packet.build_bytes_vec_compressed().map_err(|error| Malformed(error.to_string()))?;
    if bytes.len() > MAX_PACKET {
        return Err(Malformed("it would be longer than 9000 bytes".to_owned()));
    }
    Ok(bytes)
}

/// A packet of bounded size and with a bounded number of records.
fn parsed(message: &[u8]) -> Result<Packet<'_>, Malformed> {
    if message.len() > MAX_PACKET {
        return Err(Malformed("it is longer than 9000 bytes".to_owned()));
    }
    let counts = message.get(4..12).ok_or_else(|| Malformed("it has no header".to_owned()))?;
    let records: usize = counts
        .chunks(2)
        .map(|count| count.iter().fold(0, |all, &byte| all << 8 | usize::from(byte)))
        .sum();
    if records > MAX_RECORDS {
        return Err(Malformed("it has more than 256 records".to_owned()));
    }
    Packet::parse(message).map_err(|error| Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "Kms-1.local";

    fn service() -> Service {
        Service::new(HOST, 8082).unwrap()
    }

    fn addresses() -> Vec<IpAddr> {
        ["192.0.2.7", "2001:db8::7"].map(|address| address.parse().unwrap()).into()
    }

    fn query(questions: &[(&'static str, TYPE, bool)]) -> Packet<'static> {
        let mut packet = Packet::new_query(77);
        for (name, kind, unicast) in questions {
            let (kind, class) = (QTYPE::TYPE(*kind), QCLASS::CLASS(CLASS::IN));
            packet.questions.push(Question::new(Name::new_unchecked(name), kind, class, *unicast));
        }
        packet
    }

    fn hear(packet: &Packet<'_>, port: u16) -> Heard {
        service()
            .hear(&packet.build_bytes_vec().unwrap(), port, &addresses(), &addresses())
            .unwrap()
    }

    /// Name, type and TTL of each record, in order.
    fn told(bytes: &[u8]) -> Vec<(String, TYPE, u32)> {
        let packet = Packet::parse(bytes).unwrap();
        let records = packet.answers.iter().chain(&packet.additional_records);
        records.map(|r| (r.name.to_string(), r.rdata.type_code(), r.ttl)).collect()
    }

    #[test]
    fn names() {
        for name in ["kms.local", "KMS-1.Local.", "a.b.local"] {
            assert!(Service::new(name, 1).is_ok(), "{name}");
        }
        for name in ["kms", "local", ".local", "kms.example", "k ms.local", "a..local", ""] {
            assert!(Service::new(name, 1).is_err(), "{name}");
        }
        assert!(Service::new(&format!("{}.local", "x".repeat(64)), 1).is_err());
    }

    #[test]
    fn kairos_client_gets_all_it_needs_in_one_answer() {
        let Heard::ForAll(bytes) = hear(&query(&[("_kcrypt._tcp.local", TYPE::PTR, false)]), 5353)
        else {
            panic!("no answer to all")
        };
        let instance = "Kms-1._kcrypt._tcp.local".to_owned();
        assert_eq!(
            told(&bytes),
            [
                ("_kcrypt._tcp.local".to_owned(), TYPE::PTR, 120),
                (instance.clone(), TYPE::SRV, 120),
                (instance, TYPE::TXT, 120),
                (HOST.to_owned(), TYPE::A, 120),
                (HOST.to_owned(), TYPE::AAAA, 120),
            ]
        );
        let packet = Packet::parse(&bytes).unwrap();
        let RData::SRV(srv) = &packet.additional_records[0].rdata else { panic!() };
        assert_eq!((srv.target.to_string().as_str(), srv.port), (HOST, 8082));
        assert_eq!(packet.id(), 0);
        assert!(packet.has_flags(PacketFlag::RESPONSE | PacketFlag::AUTHORITATIVE_ANSWER));
    }

    #[test]
    fn who_asks_from_a_port_of_his_own_is_answered_as_by_a_name_server() {
        let Heard::ForAsker(bytes) = hear(&query(&[("kms-1.LOCAL", TYPE::A, false)]), 40_000)
        else {
            panic!("not answered alone")
        };
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.id(), packet.questions.len()), (77, 1));
        assert_eq!(told(&bytes)[0], (HOST.to_owned(), TYPE::A, 10));
        assert!(packet.answers.iter().all(|record| !record.cache_flush));
    }

    #[test]
    fn who_wants_to_be_answered_alone_is() {
        let alone = query(&[("Kms-1.local", TYPE::AAAA, true)]);
        assert!(matches!(hear(&alone, 5353), Heard::ForAsker(_)));
        let mixed = query(&[("Kms-1.local", TYPE::AAAA, true), (SERVICE, TYPE::PTR, false)]);
        assert!(matches!(hear(&mixed, 5353), Heard::ForAll(_)));
    }

    #[test]
    fn what_is_not_ours_is_not_answered() {
        for (name, kind) in [
            ("other.local", TYPE::A),
            ("_http._tcp.local", TYPE::PTR),
            ("Kms-1.local", TYPE::SRV),
            ("Kms-1.local", TYPE::MX),
            ("_kcrypt._tcp.local", TYPE::A),
            ("x.Kms-1.local", TYPE::A),
        ] {
            assert_eq!(hear(&query(&[(name, kind, false)]), 5353), Heard::Nothing, "{name}");
        }
        assert_eq!(hear(&query(&[]), 5353), Heard::Nothing);
    }

    #[test]
    fn what_the_asker_knows_is_not_repeated() {
        let mut asked = query(&[(SERVICE, TYPE::PTR, false)]);
        let pointer = service().records(&addresses()).remove(0);
        asked.answers.push(pointer.clone());
        assert_eq!(hear(&asked, 5353), Heard::Nothing);
        asked.answers[0].ttl = TTL / 2 - 1;
        assert!(matches!(hear(&asked, 5353), Heard::ForAll(_)), "it is about to forget");
    }

    #[test]
    fn a_foreign_address_under_our_name_is_a_conflict_and_our_own_is_not() {
        let said = |addresses: &[&str], alive| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            let message = Service::new("KMS-1.local", 1).unwrap().announcement(&addresses, alive);
            service().hear(&message.unwrap(), 5353, &[], &self::addresses()).unwrap()
        };
        assert_eq!(said(&["192.0.2.7", "2001:db8::7"], true), Heard::Nothing);
        assert_eq!(said(&["192.0.2.8"], true), Heard::Conflict("192.0.2.8".parse().unwrap()));
        assert_eq!(said(&["192.0.2.8"], false), Heard::Nothing, "it says goodbye");
        let other = Service::new("other.local", 1).unwrap();
        let message = other.announcement(&["192.0.2.8".parse().unwrap()], true).unwrap();
        assert_eq!(service().hear(&message, 5353, &[], &[]), Ok(Heard::Nothing));
    }

    #[test]
    fn hostile_packets_are_refused_or_say_nothing() {
        let service = service();
        let hear = |message: &[u8]| service.hear(message, 5353, &addresses(), &addresses());
        let good = query(&[(SERVICE, TYPE::PTR, false)]).build_bytes_vec().unwrap();
        for length in 0..good.len() {
            assert!(hear(&good[..length]).is_err(), "cut to {length}");
        }
        assert!(hear(&[0; MAX_PACKET + 1]).is_err());
        let mut many = good.clone();
        many[6..8].copy_from_slice(&[0xff, 0xff]);
        assert!(hear(&many).is_err(), "65,535 answers announced");
        // A name that points at itself.
        let mut looped = good[..12].to_vec();
        looped.extend([0xc0, 12, 0, 12, 0, 1]);
        assert!(hear(&looped).is_err());
    }
}
