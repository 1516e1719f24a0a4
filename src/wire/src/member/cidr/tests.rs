use super::*;

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

#[test]
fn text_is_read_as_go_reads_it_and_written_in_its_one_form() {
    let cases = [
        ("fd10:aaaa:1::/48", "fd10:aaaa:1::/48"),
        ("FD10:AAAA:0001:0::7/48", "fd10:aaaa:1::7/48"),
        ("1:2:3:4:5:6:7::/48", "1:2:3:4:5:6:7:0/48"),
        ("1:0:0:4:5:0:0:8/64", "1::4:5:0:0:8/64"),
        ("1:0:3:4:5:6:7:8/64", "1:0:3:4:5:6:7:8/64"),
        ("fd10::1.2.3.4/48", "fd10::102:304/48"),
        ("::/0", "::/0"),
        ("::1.2.3.4/128", "::102:304/128"),
        ("10.70.172.9/24", "10.70.172.9/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("255.255.255.255/32", "255.255.255.255/32"),
    ];
    for (text, written) in cases {
        assert_eq!(cidr(text).to_string(), written);
        assert_eq!(cidr(written), cidr(text));
    }
}

#[test]
fn what_is_no_cidr_is_refused() {
    for text in [
        "",
        "/",
        "/48",
        "fd10::",
        "fd10::/",
        "fd10::/129",
        "fd10::/256",
        "fd10::/-1",
        "fd10::/+48",
        "fd10::/4 8",
        "fd10::/48 ",
        " fd10::/48",
        "fd10::/48/48",
        "fd10::/x",
        "fd10::/４８",
        "[fd10::]/48",
        "fd10::1%eth0/48",
        "fd10::1%0/128",
        "0fd10::/48",
        "::1:2:3:4:5:6:7:8/48",
        "10.0.0.0/33",
        "10.0.0/8",
        "010.0.0.0/8",
        "10.0.0.256/8",
        "0x0a.0.0.0/8",
        // Go takes these two.
        "fd10::/048",
        "10.0.0.0/08",
        // IPv4-mapped: Go takes it, writes 1.2.3.4/120 and cannot read that.
        "::ffff:1.2.3.4/120",
        "0:0:0:0:0:ffff:102:304/128",
        "1.2.3.4/120",
    ] {
        assert_eq!(text.parse::<Cidr>(), Err(NotCidr), "{text:?}");
    }
    let mapped: IpAddr = "::ffff:1.2.3.4".parse().unwrap();
    assert_eq!(Cidr::new(mapped, 120), None);
    assert_eq!(Cidr::host(mapped), cidr("1.2.3.4/32"));
}

#[test]
fn masks_contains_covers_and_overlaps() {
    assert_eq!(cidr("fd10:aaaa:1:ffff::7/48").masked(), cidr("fd10:aaaa:1::/48"));
    assert_eq!(cidr("10.70.172.9/9").masked(), cidr("10.0.0.0/9"));
    for text in ["fd10::7/128", "10.0.0.9/32"] {
        assert_eq!(cidr(text).masked(), cidr(text));
    }
    assert_eq!(cidr("fd10::7/0").masked(), cidr("::/0"));
    assert_eq!(cidr("10.0.0.9/0").masked(), cidr("0.0.0.0/0"));
    let mesh = cidr("fd10::/16");
    assert!(mesh.contains("fd10:ffff::1".parse().unwrap()));
    assert!(!mesh.contains("fd11::1".parse().unwrap()));
    assert!(!cidr("::/0").contains("10.0.0.1".parse().unwrap()));
    assert!(!cidr("0.0.0.0/0").contains("::1".parse().unwrap()));
    let (wide, narrow, beside) =
        (cidr("fd10:a:b::1/48"), cidr("fd10:a:b:c::/64"), cidr("fd10:a:c::/48"));
    assert!(wide.covers(&narrow) && !narrow.covers(&wide) && wide.covers(&wide));
    assert!(wide.overlaps(&narrow) && narrow.overlaps(&wide));
    assert!(wide.overlaps(&cidr("fd10:a:b::2/48")));
    assert!(!wide.overlaps(&beside) && !cidr("0.0.0.0/0").overlaps(&cidr("::/0")));
}

#[test]
fn keys_are_made_of_the_whole_text_and_lead_back_to_it() {
    for text in ["fd10:aaaa:1::7/48", "10.70.172.0/24", "::/0", "fd10::ffff/128"] {
        assert_eq!(cidr_of(&key_of(&cidr(text))), Some(cidr(text)));
    }
    // 0xfb and 0xff: the alphabet of URLs.
    assert!(cidr_of("peers.-_8=").is_none());
    let good = "peers.ZmQxMDphYWFhOjE6Oi80OA==";
    assert!(cidr_of(good).is_some());
    for wrong in [
        "",
        "peers.",
        "peers",
        "ZmQxMDphYWFhOjE6Oi80OA==",
        "Peers.ZmQxMDphYWFhOjE6Oi80OA==",
        "peers.ZmQxMDphYWFhOjE6Oi80OA",
        "peers.ZmQxMDphYWFhOjE6Oi80OA=",
        "peers.ZmQxMDphYWFhOjE6Oi80OB==",
        "peers.ZmQxMDphYWFhOjE6Oi80OA==\n",
        "peers.x.ZmQxMDphYWFhOjE6Oi80OA==",
        // FD10:AAAA:1::/48, as no agent writes it.
        "peers.RkQxMDpBQUFBOjE6Oi80OA==",
        // fd10:aaaa:1:: without a length
        "peers.ZmQxMDphYWFhOjE6Og==",
    ] {
        assert_eq!(cidr_of(wrong), None, "{wrong:?}");
    }
}
