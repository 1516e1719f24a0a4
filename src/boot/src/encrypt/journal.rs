//! The copy of the file system's head that is kept until all is encrypted, and the record that says what it is for.
//!
//! **Phase undo.** cryptsetup writes a finished header over the first 16 MiB of the partition after it has moved these away. When
//! the power goes during that write, the partition has half a file system and half a header, and nothing that says so. Here:
//!
//! 1. the head is copied and synced;
//! 2. the record, with the copy's digests, is written and synced: from here on the head can be restored;
//! 3. sector 0 of the header is written and synced: a single sector, so it is there or not, and it has LUKS' magic. A head
//!    that has it was begun to be overwritten; a head that has not is the untouched file system, whoever has changed it since;
//! 4. the rest of the header is written and synced.
//!
//! A run that finds LUKS' magic and such a record restores the head from the copy, sector 0 last, and begins anew.
//!
//! **Phase copy.** libcryptsetup (2.6.1 to 2.8.6 at least) recovers an interrupted *last* zone, the source of which is the moved head,
//! by encrypting it once more, then wiping the source, and only then writing the header (reencrypt_recovery() calls
//! reencrypt_teardown_ok() before LUKS2_hdr_write()). If the power goes again between the two, the next recovery encrypts what the wipe
//! has left. Therefore the record stays, and a wiped source is put right before libcryptsetup recovers. It is renewed whenever
//! encryption is resumed: the volume can have been in use in between.

use sha2::{Digest, Sha256};

use super::EncryptError;
use super::device::Device;
use super::header::BinaryHeader;
use super::layout::{BLOCK, Layout};

/// The unit a disk writes whole or not at all.
const SECTOR: usize = 512;
const MAGIC: &[u8; 16] = b"latchkey head 1\n";
const UUID_BYTES: usize = 40;
/// Each is wiped or restored on its own; 1 MiB of 16.
const CHUNKS: usize = 16;
/// Magic, phase, shift, copy, seqid, uuid, digests; then zeros, and the SHA-256 of all before.
const DIGEST_AT: usize = BLOCK as usize - 32;

/// SHA-256 of the copy's chunks.
type Digests = [[u8; 32]; CHUNKS];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Undo,
    Copy,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    phase: Phase,
    shift: u64,
    copy: u64,
    /// Of the header that was being put in place: a header that is further on was complete.
    seqid: u64,
    uuid: String,
    digests: Digests,
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        let phase = match self.phase {
            Phase::Undo => 0_u64,
            Phase::Copy => 1,
        };
        let mut bytes = Vec::with_capacity(BLOCK as usize);
        bytes.extend(MAGIC);
        for number in [phase, self.shift, self.copy, self.seqid] {
            bytes.extend(number.to_be_bytes());
        }
        let mut uuid = self.uuid.clone().into_bytes();
        uuid.resize(UUID_BYTES, 0);
        bytes.extend(uuid);
        bytes.extend(self.digests.as_flattened());
        bytes.resize(DIGEST_AT, 0);
        let digest = Sha256::digest(&bytes);
        bytes.extend(digest);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (content, digest) = bytes.split_at_checked(DIGEST_AT)?;
        if Sha256::digest(content).as_slice() != digest {
            return None;
        }
        let (magic, mut rest) = content.split_first_chunk()?;
        let mut number = || {
            let (number, after) = rest.split_first_chunk()?;
            rest = after;
            Some(u64::from_be_bytes(*number))
        };
        let (phase, shift, copy, seqid) = (number()?, number()?, number()?, number()?);
        let (uuid, rest) = rest.split_first_chunk::<UUID_BYTES>()?;
        let uuid = uuid.split(|byte| *byte == 0).next()?;
        let mut digests = Digests::default();
        for (digest, bytes) in digests.iter_mut().zip(rest.chunks_exact(32)) {
            digest.copy_from_slice(bytes);
        }
        let phase = match phase {
            0 => Phase::Undo,
            1 => Phase::Copy,
            _ => return None,
        };
        let uuid = std::str::from_utf8(uuid).ok()?.to_owned();
        (magic == MAGIC).then_some(Self { phase, shift, copy, seqid, uuid, digests })
    }

    /// The record on this partition, if there is one and it was written whole.
    fn read(device: &Device, layout: &Layout) -> Result<Option<Self>, EncryptError> {
        let record = Self::decode(&device.read(layout.record, BLOCK)?);
        Ok(record.filter(|record| (record.shift, record.copy) == (layout.shift, layout.copy)))
    }

    /// The record by which this header, half put in place, can be undone.
    pub(super) fn to_undo(
        device: &Device,
        header: &BinaryHeader,
    ) -> Result<Option<Self>, EncryptError> {
        let Ok(layout) = Layout::of(device.path(), device.size()) else { return Ok(None) };
        let record = Self::read(device, &layout)?;
        Ok(record.filter(|record| record.belongs_to(header)))
    }

    fn belongs_to(&self, header: &BinaryHeader) -> bool {
        self.phase == Phase::Undo && header.uuid == self.uuid && header.seqid <= self.seqid
    }

    /// The chunks of the copy: offset within it, digest.
    fn chunks(&self) -> impl Iterator<Item = (u64, &[u8; 32])> {
        let size = chunk_size(self.shift);
        self.digests.iter().zip(0_u64..).map(move |(digest, index)| (index * size, digest))
    }
}

fn chunk_size(length: u64) -> u64 {
    length / CHUNKS as u64
}

fn digests(head: &[u8]) -> Digests {
    let mut digests = Digests::default();
    for (digest, chunk) in digests.iter_mut().zip(head.chunks(head.len().div_ceil(CHUNKS).max(1))) {
        *digest = Sha256::digest(chunk).into();
    }
    digests
}

fn is(bytes: &[u8], digest: &[u8; 32]) -> bool {
    Sha256::digest(bytes).as_slice() == digest
}

/// Puts `header` (`layout.shift` bytes) in the place of `head`, of which a copy must have been made.
pub(super) fn install(
    device: &Device,
    layout: &Layout,
    header: &[u8],
    head: &[u8],
) -> Result<(), EncryptError> {
    let Some(BinaryHeader { seqid, uuid, .. }) = BinaryHeader::parse(header) else {
        return Err(verify(device, "the new LUKS2 header"));
    };
    let record = Record {
        phase: Phase::Undo,
        shift: layout.shift,
        copy: layout.copy,
        seqid,
        uuid,
        digests: digests(head),
    };
    device.write(layout.record, &record.encode())?;
    device.sync()?;
    put(device, header, Order::FirstSectorFirst)
}

/// Puts the head back where it was, from its copy.
pub(super) fn undo(device: &Device, layout: &Layout, record: &Record) -> Result<(), EncryptError> {
    let head = device.read(record.copy, record.shift)?;
    if digests(&head) != record.digests {
        return Err(verify(device, "the copy of the file system's first part"));
    }
    put(device, &head, Order::FirstSectorLast)?;
    forget(device, layout)
}

/// Before zones are encrypted: makes the copy what the head is now, and the record one of phase copy.
pub(super) fn renew(device: &Device, layout: &Layout) -> Result<(), EncryptError> {
    let size = chunk_size(layout.shift);
    let mut digests = Digests::default();
    for (digest, index) in digests.iter_mut().zip(0_u64..) {
        let chunk = device.read(layout.moved + index * size, size)?;
        if device.read(layout.copy + index * size, size)? != chunk {
            device.write(layout.copy + index * size, &chunk)?;
        }
        *digest = Sha256::digest(&chunk).into();
    }
    device.sync()?;
    let (shift, copy) = (layout.shift, layout.copy);
    let record = Record { phase: Phase::Copy, shift, copy, seqid: 0, uuid: String::new(), digests };
    device.write(layout.record, &record.encode())?;
    device.sync()
}

/// Before libcryptsetup recovers the last zone: puts back what an interrupted recovery has wiped of its source.
pub(super) fn restore_moved(device: &Device, layout: &Layout) -> Result<(), EncryptError> {
    let Some(record) = Record::read(device, layout)? else { return Ok(()) };
    let size = chunk_size(layout.shift);
    for (offset, digest) in record.chunks() {
        if is(&device.read(layout.moved + offset, size)?, digest) {
            continue;
        }
        let chunk = device.read(layout.copy + offset, size)?;
        if !is(&chunk, digest) {
            return Err(verify(device, "the copy of the file system's first part"));
        }
        device.write(layout.moved + offset, &chunk)?;
    }
    device.sync()
}

/// When all is encrypted: wipes the moved head, the copy and the record, as far as they still are what they were. The volume may
/// have been used since, up to its end.
pub(super) fn clean(device: &Device, layout: &Layout) -> Result<(), EncryptError> {
    let Some(record) = Record::read(device, layout)? else { return Ok(()) };
    let size = chunk_size(layout.shift);
    for (offset, digest) in record.chunks() {
        for at in [layout.moved + offset, layout.copy + offset] {
            if is(&device.read(at, size)?, digest) {
                wipe(device, at, size)?;
            }
        }
    }
    wipe(device, layout.record, BLOCK)
}

/// With random bytes, as all around it looks.
fn wipe(device: &Device, offset: u64, length: u64) -> Result<(), EncryptError> {
    let mut noise = vec![0; usize::try_from(length).unwrap_or_default()];
    getrandom::fill(&mut noise).map_err(EncryptError::Random)?;
    device.write(offset, &noise)?;
    device.sync()
}

/// Takes the record away.
pub(super) fn forget(device: &Device, layout: &Layout) -> Result<(), EncryptError> {
    device.write(layout.record, &[0; BLOCK as usize])?;
    device.sync()
}

pub(super) enum Order {
    FirstSectorFirst,
    FirstSectorLast,
}

/// Writes `bytes` at the partition's beginning, with the first sector before or after all others.
pub(super) fn put(device: &Device, bytes: &[u8], order: Order) -> Result<(), EncryptError> {
    let (first, rest) = bytes.split_at_checked(SECTOR).unwrap_or((bytes, &[]));
    let parts = match order {
        Order::FirstSectorFirst => [(0, first), (SECTOR as u64, rest)],
        Order::FirstSectorLast => [(SECTOR as u64, rest), (0, first)],
    };
    for (offset, part) in parts {
        device.write(offset, part)?;
        device.sync()?;
    }
    Ok(())
}

fn verify(device: &Device, what: &'static str) -> EncryptError {
    EncryptError::Verify { path: device.path().to_owned(), what }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            phase: Phase::Undo,
            shift: 2 << 20,
            copy: 7 << 20,
            seqid: 5,
            uuid: "c38a1a7e-1f0a-4a83-b3ab-0e5b0b0b7d8e".to_owned(),
            digests: digests(&[7; 2 << 20]),
        }
    }

    #[test]
    fn a_record_reads_back_and_a_torn_one_does_not() {
        let bytes = record().encode();
        assert_eq!(bytes.len() as u64, BLOCK);
        assert_eq!(Record::decode(&bytes), Some(record()));
        for sector in 0..8 {
            let mut torn = bytes.clone();
            torn[sector * 512..][..512].fill(0xa5);
            assert_eq!(Record::decode(&torn), None, "{sector}");
        }
        assert_eq!(Record::decode(&[0; BLOCK as usize]), None);
        assert_eq!(Record::decode(&bytes[..4095]), None);
        assert_eq!(Record::decode(&[]), None);
    }

    #[test]
    fn only_the_header_it_was_made_for_is_undone_and_not_one_that_went_on() {
        let header =
            |seqid, uuid: &str| BinaryHeader { seqid, uuid: uuid.to_owned(), label: String::new() };
        let record = record();
        assert!(record.belongs_to(&header(5, &record.uuid)));
        assert!(!record.belongs_to(&header(6, &record.uuid)));
        assert!(!record.belongs_to(&header(5, "another")));
        let copy = Record { phase: Phase::Copy, ..record.clone() };
        assert!(!copy.belongs_to(&header(5, &record.uuid)));
    }
}
