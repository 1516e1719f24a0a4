//! Makes `man/` and `completions/` again.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let root = latchkey_docs::root();
    for folder in latchkey_docs::FOLDERS {
        match std::fs::remove_dir_all(root.join(folder)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    for (file, content) in latchkey_docs::files()? {
        let path = root.join(file);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        std::fs::write(path, content)?;
    }
    Ok(())
}
