//! The TCTI under tss-esapi's context: TCG TSS 2.0 TCTI 1.0 §3, with [`Transport`] behind it.
//!
//! Why our own. tss-esapi 7.7 opens its TPM with `Tss2_TctiLdr_Initialize`, which `dlopen`s a module
//! that no tool which builds an initramfs can see, knows no unix sockets, and keeps the connection
//! to itself; and it has no `TPM2_CertifyCreation`, which the attestation key of kcrypt needs on the
//! *same* connection. This file defines the loader's four symbols. The static definition wins over
//! libtss2-tctildr, nothing is `dlopen`ed, and [`crate::certify_creation`] can use the connection
//! between two calls of tss-esapi. A test proves that the context really talks through here.

// The callbacks of a C interface; every unsafe block below says what it relies on.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ffi::c_char;
use std::rc::Rc;

use tss_esapi_sys::{
    TSS2_RC, TSS2_TCTI_CONTEXT, TSS2_TCTI_CONTEXT_COMMON_V1, TSS2_TCTI_INFO, size_t,
};

use crate::transport::{MAX_MESSAGE, Transport};

pub(crate) type SharedTransport = Rc<RefCell<Transport>>;

const MAGIC: u64 = 0x4c41_5443_484b_4559; // "LATCHKEY"
/// `TSS2_TCTI_RC_LAYER` (10 << 16) with the base codes of TSS 2.0 Overview §4.
const RC_BAD_REFERENCE: TSS2_RC = 0x000a_0005;
const RC_BAD_SEQUENCE: TSS2_RC = 0x000a_0007;
const RC_IO_ERROR: TSS2_RC = 0x000a_000a;
const RC_NOT_IMPLEMENTED: TSS2_RC = 0x000a_0002;
const RC_INSUFFICIENT_BUFFER: TSS2_RC = 0x000a_0006;

thread_local! {
    /// The transport that the next context opened on this thread is to use.
    static NEXT: RefCell<Option<SharedTransport>> = const { RefCell::new(None) };
}

/// Runs `open`, which creates an ESYS context on this thread, with `transport` under it.
pub(crate) fn with_transport<T>(transport: &SharedTransport, open: impl FnOnce() -> T) -> T {
    NEXT.set(Some(Rc::clone(transport)));
    let opened = open();
    NEXT.set(None);
    opened
}

/// What ESYS holds a pointer to. `common` comes first: the C side sees only that.
#[repr(C)]
struct Tcti {
    common: TSS2_TCTI_CONTEXT_COMMON_V1,
    transport: SharedTransport,
    pending: Option<Result<(), ()>>,
}

#[unsafe(no_mangle)]
extern "C" fn Tss2_TctiLdr_Initialize(
    _name_conf: *const c_char,
    context: *mut *mut TSS2_TCTI_CONTEXT,
) -> TSS2_RC {
    let Some(transport) = NEXT.take() else { return RC_BAD_SEQUENCE };
    if context.is_null() {
        return RC_BAD_REFERENCE;
    }
    let tcti = Box::new(Tcti {
        common: TSS2_TCTI_CONTEXT_COMMON_V1 {
            magic: MAGIC,
            version: 1,
            transmit: Some(transmit),
            receive: Some(receive),
            finalize: None,
            cancel: None,
            getPollHandles: None,
            setLocality: Some(set_locality),
        },
        transport,
        pending: None,
    });
    // SAFETY: `context` is not null and points to the caller's variable; the box is given back to
    // Tss2_TctiLdr_Finalize, which is called exactly once for it.
    unsafe { *context = Box::into_raw(tcti).cast() };
    0
}

#[unsafe(no_mangle)]
extern "C" fn Tss2_TctiLdr_Finalize(context: *mut *mut TSS2_TCTI_CONTEXT) {
    // SAFETY: tss-esapi passes the address of the pointer that Initialize filled in, once.
    unsafe {
        if !context.is_null() && !(*context).is_null() {
            drop(Box::from_raw((*context).cast::<Tcti>()));
            *context = std::ptr::null_mut();
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn Tss2_TctiLdr_GetInfo(
    _name_conf: *const c_char,
    _info: *mut *mut TSS2_TCTI_INFO,
) -> TSS2_RC {
    RC_NOT_IMPLEMENTED
}

#[unsafe(no_mangle)]
extern "C" fn Tss2_TctiLdr_FreeInfo(_info: *mut *mut TSS2_TCTI_INFO) {}

unsafe extern "C" fn transmit(
    context: *mut TSS2_TCTI_CONTEXT,
    size: size_t,
    command: *const u8,
) -> TSS2_RC {
    if context.is_null() || command.is_null() || size as usize > MAX_MESSAGE {
        return RC_BAD_REFERENCE;
    }
    // SAFETY: ESYS hands back the pointer it got from Initialize, from the one thread that owns the
    // context, and `size` readable bytes at `command`.
    let (tcti, command) = unsafe {
        (&mut *context.cast::<Tcti>(), std::slice::from_raw_parts(command, size as usize))
    };
    let sent = match tcti.transport.try_borrow_mut() {
        Ok(mut transport) => transport.transact(command).map(drop).map_err(|error| {
            log::debug!("the exchange with the TPM failed: {error}");
        }),
        Err(_) => return RC_BAD_SEQUENCE,
    };
    let code = if sent.is_ok() { 0 } else { RC_IO_ERROR };
    tcti.pending = Some(sent);
    code
}

unsafe extern "C" fn receive(
    context: *mut TSS2_TCTI_CONTEXT,
    size: *mut size_t,
    response: *mut u8,
    _timeout: i32,
) -> TSS2_RC {
    if context.is_null() || size.is_null() {
        return RC_BAD_REFERENCE;
    }
    // SAFETY: as in `transmit`; `size` points to the caller's variable.
    let (tcti, room) = unsafe { (&mut *context.cast::<Tcti>(), &mut *size) };
    match tcti.pending {
        None => return RC_BAD_SEQUENCE,
        Some(Err(())) => return RC_IO_ERROR,
        Some(Ok(())) => {}
    }
    let Ok(transport) = tcti.transport.try_borrow() else { return RC_BAD_SEQUENCE };
    let answer = transport.response();
    let capacity = *room as usize;
    *room = answer.len() as size_t;
    if response.is_null() {
        return 0;
    }
    if capacity < answer.len() {
        return RC_INSUFFICIENT_BUFFER;
    }
    // SAFETY: the caller gives `capacity` writable bytes at `response`, and `answer` fits in them.
    unsafe { std::ptr::copy_nonoverlapping(answer.as_ptr(), response, answer.len()) };
    tcti.pending = None;
    0
}

unsafe extern "C" fn set_locality(_context: *mut TSS2_TCTI_CONTEXT, _locality: u8) -> TSS2_RC {
    RC_NOT_IMPLEMENTED
}
