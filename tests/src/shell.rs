//! A shell in a booted machine, on its console: for tests in which the machine and the world around it take turns.

use crate::{
    error::{Error, Result},
    vm::{RunningVm, Vm},
};

/// A machine whose console is a shell, until [`Shell::leave`].
#[derive(Debug)]
pub struct Shell {
    name: String,
    vm: RunningVm,
    commands: u32,
}

/// What a command said, both streams together, line by line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub code: i32,
    pub lines: Vec<String>,
}

impl Said {
    pub fn text(&self) -> String {
        self.lines.join("\n")
    }
}

impl Shell {
    /// Starts the machine.
    pub fn boot(name: &str, vm: Vm<'_>) -> Result<Self> {
        let vm = vm.append("systemd.wants=latchkey-test-shell.service").start()?;
        Ok(Self { name: name.to_owned(), vm, commands: 0 })
    }

    /// Waits until it takes commands.
    pub fn wait(&self) -> Result<()> {
        self.vm.wait_for_finished("^SHELL ready$").map(drop)
    }

    pub fn vm(&self) -> &RunningVm {
        &self.vm
    }

    /// Runs one line of bash. It must fit the terminal's line of 4,095 bytes.
    pub fn run(&mut self, command: &str) -> Result<Said> {
        self.commands += 1;
        let n = self.commands;
        self.vm.type_line(&format!("{n} {command}"))?;
        let end = self.vm.wait_for_finished(&format!(r"^SHELL {n} exited with \d+$"))?;
        let code = end.text.rsplit(' ').next().and_then(|code| code.parse().ok());
        let code = code.ok_or_else(|| Error::Report(end.text.clone()))?;
        let prefix = format!("SHELL {n}: ");
        let lines = self.vm.console().matching(&format!("^{prefix}"))?;
        let lines = lines.iter().map(|line| line.text.replacen(&prefix, "", 1)).collect();
        Ok(Said { code, lines })
    }

    /// The same for a command that must succeed: what it said.
    pub fn ok(&mut self, command: &str) -> Result<String> {
        let said = self.run(command)?;
        if said.code == 0 {
            return Ok(said.text());
        }
        Err(Error::Report(format!(
            "{}: `{command}` exited with {}: {}",
            self.name,
            said.code,
            said.text()
        )))
    }

    /// Tries a command until it succeeds, for a minute and a half: what it said then.
    pub fn until(&mut self, command: &str) -> Result<String> {
        self.ok(&format!("until_true '{}'", command.replace('\'', r"'\''")))
    }

    /// Lets the boot go on to its report.
    pub fn leave(mut self) -> Result<RunningVm> {
        self.vm.type_line("0 exit")?;
        Ok(self.vm)
    }
}
