//! What a process writes to a file, and when it syncs it, in order: recorded with ptrace(2), so that the code under test and
//! libcryptsetup are as they are in use.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Write {
        offset: usize,
        data: Vec<u8>,
    },
    /// All writes before it are on the disk now.
    Sync,
}

/// Runs the command to its end and returns what it did to `file`.
#[expect(clippy::zombie_processes, reason = "waitpid() waits for it")]
pub(crate) fn record(command: &mut Command, file: &Path) -> Vec<Event> {
    let traced = || ptrace::traceme().map_err(Into::into);
    // SAFETY: between fork and exec only ptrace(2) is called, which allocates nothing and takes no lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(traced);
    }
    let child = command.spawn().unwrap();
    let main = Pid::from_raw(child.id().cast_signed());
    assert!(matches!(waitpid(main, None).unwrap(), WaitStatus::Stopped(_, Signal::SIGTRAP)));
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(main, options).unwrap();
    ptrace::syscall(main, None).unwrap();

    let mut recorder = Recorder { file, calls: HashMap::new(), events: Vec::new() };
    loop {
        // Children of this thread only: other tests have theirs.
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        match waitpid(None, Some(flags)).unwrap() {
            WaitStatus::PtraceSyscall(thread) => {
                recorder.syscall(thread);
                ptrace::syscall(thread, None).unwrap();
            }
            WaitStatus::PtraceEvent(thread, ..) | WaitStatus::Stopped(thread, Signal::SIGSTOP) => {
                ptrace::syscall(thread, None).unwrap();
            }
            WaitStatus::Stopped(thread, signal) => ptrace::syscall(thread, signal).unwrap(),
            WaitStatus::Exited(thread, code) if thread == main => {
                assert_eq!(code, 0, "the traced program failed");
                return recorder.events;
            }
            WaitStatus::Signaled(thread, signal, _) => panic!("{thread} died of {signal}"),
            _ => {}
        }
    }
}

struct Recorder<'f> {
    file: &'f Path,
    /// What threads that are in a system call are about to do.
    calls: HashMap<Pid, Option<Event>>,
    events: Vec<Event>,
}

impl Recorder<'_> {
    fn syscall(&mut self, thread: Pid) {
        match self.calls.remove(&thread) {
            None => {
                let event = self.entered(thread);
                self.calls.insert(thread, event);
            }
            Some(None) => {}
            Some(Some(event)) => {
                let result = ptrace::getregs(thread).unwrap().rax.cast_signed();
                match event {
                    Event::Write { offset, mut data } if result >= 0 => {
                        data.truncate(result as usize);
                        self.events.push(Event::Write { offset, data });
                    }
                    Event::Sync if result == 0 => self.events.push(Event::Sync),
                    event => panic!("{event:?}: {result}"),
                }
            }
        }
    }

    fn entered(&self, thread: Pid) -> Option<Event> {
        let registers = ptrace::getregs(thread).unwrap();
        let (fd, address, length) = (registers.rdi, registers.rsi, registers.rdx as usize);
        let call = registers.orig_rax.cast_signed();
        // The mapped file is the fifth argument.
        let fd = if call == libc::SYS_mmap { registers.r8 } else { fd };
        let known = [
            libc::SYS_write,
            libc::SYS_pwrite64,
            libc::SYS_fsync,
            libc::SYS_fdatasync,
            libc::SYS_mmap,
            libc::SYS_writev,
            libc::SYS_pwritev,
            libc::SYS_pwritev2,
            libc::SYS_ftruncate,
            libc::SYS_fallocate,
            libc::SYS_sendfile,
            libc::SYS_copy_file_range,
            libc::SYS_splice,
        ];
        let target = fs::read_link(format!("/proc/{thread}/fd/{fd}"));
        if !known.contains(&call) || target.ok().as_deref() != Some(self.file) {
            return None;
        }
        match call {
            libc::SYS_fsync | libc::SYS_fdatasync => Some(Event::Sync),
            libc::SYS_pwrite64 => {
                let offset = registers.r10 as usize;
                Some(Event::Write { offset, data: memory(thread, address, length) })
            }
            libc::SYS_write => {
                let offset = position(thread, fd);
                Some(Event::Write { offset, data: memory(thread, address, length) })
            }
            // Would be missed.
            other => panic!("the file is changed by system call {other}"),
        }
    }
}

fn memory(thread: Pid, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    File::open(format!("/proc/{thread}/mem")).unwrap().read_exact_at(&mut bytes, address).unwrap();
    bytes
}

fn position(thread: Pid, fd: u64) -> usize {
    let info = fs::read_to_string(format!("/proc/{thread}/fdinfo/{fd}")).unwrap();
    info.lines().find_map(|line| line.strip_prefix("pos:")).unwrap().trim().parse().unwrap()
}
