//! The answer to a GET: status, the headers that matter, the body however it is framed (RFC 9112 §4 to §7).

use std::io::{self, BufRead, ErrorKind, Read};

/// Status line and headers together.
const MAX_HEAD: u64 = 16 * 1024;
/// One line of chunked framing, its extensions included.
const MAX_CHUNK_LINE: u64 = 1024;

/// What a server answered.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// Where a redirection leads.
    pub location: Option<String>,
    pub body: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    /// To the end of the connection.
    Close,
}

impl Response {
    /// Reads one response with a body of at most `max` bytes; the body of another status than 200 is not read.
    ///
    /// # Errors
    /// What the connection said, and [`ErrorKind::InvalidData`] for what is no response or too large.
    pub fn read(from: &mut impl BufRead, max: usize) -> io::Result<Self> {
        let mut left = MAX_HEAD;
        let status = status(&line(from, &mut left)?)?;
        let mut response = Self { status, ..Self::default() };
        let mut framing = Framing::Close;
        loop {
            let header = line(from, &mut left)?;
            if header.is_empty() {
                break;
            }
            let (name, value) =
                header.split_once(':').ok_or_else(|| invalid("a header without a colon"))?;
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "location" => response.location = Some(value.to_owned()),
                "transfer-encoding" if value.eq_ignore_ascii_case("chunked") => {
                    framing = Framing::Chunked;
                }
                "transfer-encoding" => return Err(invalid("a transfer coding other than chunked")),
                "content-encoding" if !value.eq_ignore_ascii_case("identity") => {
                    return Err(invalid("a compressed body, which was not asked for"));
                }
                // Both together are how requests are smuggled; chunked counts (RFC 9112 §6.3).
                "content-length" if framing != Framing::Chunked => {
                    framing = length(value, framing)?
                }
                _ => {}
            }
        }
        if status == 200 {
            response.body = body(from, framing, max as u64)?;
        }
        Ok(response)
    }
}

fn status(line: &str) -> io::Result<u16> {
    let not_http = || invalid("no HTTP/1 status line");
    let rest = line.strip_prefix("HTTP/1.").ok_or_else(not_http)?;
    let (_, rest) = rest.split_once(' ').ok_or_else(not_http)?;
    let code = rest.get(..3).filter(|code| code.bytes().all(|byte| byte.is_ascii_digit()));
    let ends = rest.get(3..).is_some_and(|reason| reason.is_empty() || reason.starts_with(' '));
    match code.and_then(|code| code.parse().ok()) {
        Some(code @ 200..=599) if ends => Ok(code),
        _ => Err(not_http()),
    }
}

fn length(value: &str, known: Framing) -> io::Result<Framing> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    let length = value.parse().ok().filter(|_| digits).map(Framing::Length);
    match (known, length) {
        (Framing::Close, Some(length)) => Ok(length),
        (known, Some(length)) if known == length => Ok(length),
        _ => Err(invalid("a Content-Length that is no number, or two of them")),
    }
}

fn body(from: &mut impl BufRead, framing: Framing, max: u64) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    match framing {
        Framing::Length(length) => exactly(from, length, max, &mut body)?,
        Framing::Close => {
            from.take(max.saturating_add(1)).read_to_end(&mut body)?;
            if body.len() as u64 > max {
                return Err(too_large(max));
            }
        }
        Framing::Chunked => loop {
            let size = chunk_size(&line(from, &mut MAX_CHUNK_LINE.clone())?)?;
            if size == 0 {
                break; // trailers are nothing to us, and the connection ends here
            }
            exactly(from, size, max, &mut body)?;
            if !line(from, &mut MAX_CHUNK_LINE.clone())?.is_empty() {
                return Err(invalid("a chunk longer than it says"));
            }
        },
    }
    Ok(body)
}

/// `length` bytes more, so that there are no more than `max`. What is said to come is not reserved before it comes.
fn exactly(from: &mut impl BufRead, length: u64, max: u64, body: &mut Vec<u8>) -> io::Result<()> {
    if length.saturating_add(body.len() as u64) > max {
        return Err(too_large(max));
    }
    match from.take(length).read_to_end(body)? as u64 {
        read if read == length => Ok(()),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

fn chunk_size(line: &str) -> io::Result<u64> {
    let digits = line.split(';').next().unwrap_or_default().trim_end();
    let hexadecimal = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16)
        .ok()
        .filter(|_| hexadecimal)
        .ok_or_else(|| invalid("a chunk without a size"))
}

/// One line without its end, and `left` less by its length.
fn line(from: &mut impl BufRead, left: &mut u64) -> io::Result<String> {
    let mut line = Vec::new();
    from.take(*left).read_until(b'\n', &mut line)?;
    *left = left.saturating_sub(line.len() as u64);
    let text = match line.strip_suffix(b"\n") {
        Some(text) => text.strip_suffix(b"\r").unwrap_or(text),
        None if *left == 0 => return Err(invalid("a line or headers without end")),
        None => return Err(ErrorKind::UnexpectedEof.into()),
    };
    match std::str::from_utf8(text) {
        Ok(text) if !text.contains(|c: char| c.is_control() && c != '\t') => Ok(text.to_owned()),
        _ => Err(invalid("a header with control characters")),
    }
}

fn too_large(max: u64) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("a document of more than {max} bytes"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> io::Result<Response> {
        Response::read(&mut text.as_bytes(), 10)
    }

    #[test]
    fn a_body_is_framed_by_length_by_chunks_or_by_the_end() {
        for text in [
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more",
            "HTTP/1.1 200 OK\r\ncontent-length:5\r\nCONTENT-LENGTH: 5\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\n\r\nhello",
            "HTTP/1.0 200\nX: y\n\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n03\r\nllo\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ] {
            let response = read(text).unwrap();
            assert_eq!((response.status, response.body.as_slice()), (200, &b"hello"[..]), "{text}");
        }
    }

    #[test]
    fn a_redirection_has_a_place_and_no_body_is_read_of_it() {
        let response =
            read("HTTP/1.1 302 Found\r\nLocation: /there\r\nContent-Length: 999\r\n\r\n").unwrap();
        assert_eq!((response.status, response.location.as_deref()), (302, Some("/there")));
        assert_eq!(read("HTTP/1.1 404 Not Found\r\n\r\nhello").unwrap().body, b"");
    }

    #[test]
    fn what_is_no_response_or_too_large_is_refused() {
        let header = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(20_000));
        for text in [
            "",
            "SSH-2.0-OpenSSH\r\n",
            "HTTP/2 200\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello world",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 4\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\nhello world",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello6\r\n world\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nhello",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
            &header,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
