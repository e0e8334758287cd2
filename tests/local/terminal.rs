//! A terminal for a program, as a person has one: it shows, and keys are typed on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{Winsize, openpty};

pub struct Terminal {
    keys: File,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts a program on a new terminal, which becomes the controlling one of a session of its own.
    pub fn start(program: &Command) -> (Self, Child) {
        let size = Winsize { ws_row: 24, ws_col: 160, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).expect("a terminal");
        let end = |fd: &OwnedFd| Stdio::from(fd.try_clone().expect("descriptor"));
        let child = Command::new("/bin/busybox")
            .args(["setsid", "-c"])
            .arg(program.get_program())
            .args(program.get_args())
            .env("TERM", "xterm")
            .env_remove("NO_COLOR")
            .stdin(end(&pair.slave))
            .stdout(end(&pair.slave))
            .stderr(end(&pair.slave))
            .spawn()
            .expect("busybox");
        drop(pair.slave);
        let keys = File::from(pair.master);
        let mut screen = keys.try_clone().expect("descriptor");
        let shown = Arc::new(Mutex::new(Vec::new()));
        let kept = shown.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // an error: nobody has the other end any more
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                kept.lock().expect("screen").extend_from_slice(&buffer[..count]);
            }
        });
        (Self { keys, shown }, child)
    }

    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().expect("screen")).into_owned()
    }

    pub fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).expect("type");
    }
}
