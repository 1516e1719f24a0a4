#!/bin/bash
# dracut module `latchkey`: opens the machine's LUKS2 volumes in the initramfs, by TPM or key server (dracut.modules(7)).
#
# Written for dracut 059, where a failing install() does not stop dracut and a failing installkernel() does. So everything
# that would otherwise fail at boot is looked for here, all that is missing is listed, and dracut is stopped with exit 1:
# the initramfs that was there before stays.
#
# Settings, from dracut.conf(5) or the environment:
#   latchkey_program=PATH   the program, default /usr/bin/kcrypt-discovery-challenger
#   latchkey_network=no     leave dracut's network module out: for machines that unlock by their TPM alone

# Where this is included is for the administrator to say: add_dracutmodules+=" latchkey ".
check() {
    [[ $mount_needs ]] && return 1
    return 255
}

# Not `crypt`: the volumes are opened by the program, and cryptroot-ask would ask for them a second time. Not `tpm2-tss`:
# it wants tpm2-tools, which nothing here runs. Not `dm`: it brings every RAID and cache driver there is, 1 MiB of them, and
# the little else that it does is done below. `network` brings in a back end but no network: that is for rd.neednet=1 on
# the kernel's command line to ask for.
depends() {
    [[ $latchkey_network == no ]] || echo network
    return 0
}

installkernel() {
    # Whatever the build host runs on: an initramfs is made on one machine and booted on another more often than not.
    local hostonly=''
    instmods '=drivers/char/tpm'
    # On these machines the TPM is a chip on a serial bus, and the controller's driver a module.
    [[ ${DRACUT_ARCH:-$(uname -m)} == aarch64 ]] && instmods '=drivers/spi' '=drivers/i2c/busses'
    # The last ones are what LUKS2 volumes are made with elsewhere: an old cipher mode, another key slot cipher.
    instmods dm_crypt xts ecb cbc essiv aes aes_generic aesni_intel aes_ce_blk sha256 sha256_generic sha256_ssse3 \
        sha256_ce sha512 sha512_generic algif_skcipher
    # COS_OEM, where the cloud-config is.
    instmods ext4
    instmods wireguard
    # Built in nearly everywhere; without it no key server is reached where there is no IPv4.
    instmods ipv6

    local _why="it comes with the kernel's package; look for it below $srcmods"
    _latchkey_kernel_has dm_crypt || _latchkey_missing "kernel module dm_crypt" "$_why (CONFIG_DM_CRYPT)"
    _latchkey_kernel_has xts || _latchkey_missing "kernel module xts" "$_why (CONFIG_CRYPTO_XTS)"
    _latchkey_kernel_has aes aes_generic aesni_intel aes_ce_blk \
        || _latchkey_missing "AES in the kernel" "$_why (CONFIG_CRYPTO_AES)"
    _latchkey_kernel_has tpm_tis tpm_crb tpm_tis_spi tpm_tis_i2c tpm_ftpm_tee tpm_ibmvtpm \
        || _latchkey_missing "a TPM driver (tpm_tis, tpm_crb, ...)" "$_why (CONFIG_TCG_TPM, CONFIG_TCG_TIS, CONFIG_TCG_CRB)"
    _latchkey_kernel_has wireguard \
        || dwarn "latchkey: no kernel module wireguard: the mesh will need a userspace WireGuard after boot"
    _latchkey_stop_if_missing
}

install() {
    local _program=${latchkey_program:-/usr/bin/kcrypt-discovery-challenger}

    _latchkey_install_program "$_program"
    _latchkey_install_device_mapper
    _latchkey_install_network_data

    if dracut_module_included "immucore"; then
        # Kairos' own initramfs program unlocks everything it finds and calls ours as its plugin: two would open each
        # volume twice.
        dinfo "latchkey: immucore is in this initramfs and does the unlocking; no unit or hook of ours is installed"
    elif dracut_module_included "systemd"; then
        _latchkey_install_units
    else
        _latchkey_install_hooks
    fi

    _latchkey_check_libraries "/usr/bin/kcrypt-discovery-challenger"
    _latchkey_check_libraries "$_latchkey_tcti"
    _latchkey_stop_if_missing
}

_latchkey_install_program() {
    local _file
    # Left to itself dracut fetches libraries after the last module, too late to be checked here.
    local DRACUT_RESOLVE_DEPS=1
    if [[ -x $dracutsysrootdir$1 ]]; then
        inst_binary "$1" /usr/bin/kcrypt-discovery-challenger
        # Where Kairos looks for its plugins.
        mkdir -p "$initdir/system/discovery"
        ln -sfn /usr/bin/kcrypt-discovery-challenger "$initdir/system/discovery/kcrypt-discovery-challenger"
    else
        _latchkey_missing "$1" "build it and run 'make install', or set latchkey_program= to where it is"
    fi

    # Both are loaded by dlopen, so no list of dependencies names them. The TCTI for /dev/tpmrm0: the program brings its own
    # (src/tpm/src/tcti.rs), this one is for tpm2-tools in the emergency shell and for another latchkey_program. And what a
    # thread needs to end.
    inst_libdir_file "libtss2-tcti-device.so.*" "libgcc_s.so.*"
    _latchkey_tcti=$(_latchkey_in_image libtss2-tcti-device.so.0) \
        || _latchkey_missing libtss2-tcti-device.so.0 "$(_latchkey_package libtss2-tcti-device.so.0)"
    _latchkey_in_image libgcc_s.so.1 > /dev/null \
        || _latchkey_missing libgcc_s.so.1 "$(_latchkey_package libgcc_s.so.1)"
    # dracut follows the dependencies of what is executable, which a Debian library is not.
    [[ $_latchkey_tcti ]] && while read -r _file; do
        inst "$_file"
    done < <("${DRACUT_LDD:-ldd}" "$dracutsysrootdir$_latchkey_tcti" 2> /dev/null | grep -o '/[^ )]*')
}

# Without these rules libdevmapper waits for ever for udev to say that it has seen the new device, and without dmsetup the
# rules cannot say it. Debian's names come second.
_latchkey_install_device_mapper() {
    inst_multiple -o dmsetup
    inst_rules 10-dm.rules 13-dm-disk.rules 95-dm-notify.rules 55-dm.rules 60-persistent-storage-dm.rules
    inst_rules "$moddir/11-latchkey-dm.rules"
    _latchkey_has /bin/dmsetup /sbin/dmsetup /usr/bin/dmsetup /usr/sbin/dmsetup \
        || _latchkey_missing dmsetup "$(_latchkey_package dmsetup)"
    _latchkey_has {/usr,}/lib/udev/rules.d/{10-dm,55-dm}.rules \
        || _latchkey_missing "udev rule 10-dm.rules (Debian: 55-dm.rules)" "$(_latchkey_package dmsetup)"
    _latchkey_has {/usr,}/lib/udev/rules.d/95-dm-notify.rules \
        || _latchkey_missing "udev rule 95-dm-notify.rules" "$(_latchkey_package dmsetup)"
}

# What TLS reads. The cloud-config is not among it: it belongs to the machine, not to the image. Names are looked up by the
# program itself, which needs no plug-in of the C library, and asks whom DHCP has named to dracut or to systemd-networkd.
_latchkey_install_network_data() {
    local _bundle
    for _bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem; do
        [[ -e $dracutsysrootdir$_bundle ]] || continue
        # Where the program looks for it, whatever the distribution.
        inst_simple "$_bundle" /etc/ssl/certs/ca-certificates.crt
        break
    done
    [[ -e $initdir/etc/ssl/certs/ca-certificates.crt ]] \
        || dwarn "latchkey: no CA bundle (package ca-certificates): a key server's certificate has to be in the cloud-config"

    # Left to itself it configures nothing without ip=.
    dracut_module_included "systemd-networkd" \
        && inst_simple "$moddir/99-latchkey-dhcp.network" "$systemdnetwork/99-latchkey-dhcp.network"
    return 0
}

_latchkey_install_units() {
    local _file
    inst_simple "$moddir/latchkey-unlock.service" "$systemdsystemunitdir/latchkey-unlock.service"
    # Required, not wanted: initrd.target fails with it, and its OnFailure= is dracut's emergency handling. The service that
    # goes on to the new root only waits for initrd.target's end, good or bad, so it has to require ours too.
    $SYSTEMCTL -q --root "$initdir" add-requires initrd.target latchkey-unlock.service
    $SYSTEMCTL -q --root "$initdir" add-requires initrd-cleanup.service latchkey-unlock.service

    # What shows the passphrase prompt on the console, and takes the answer.
    inst_multiple -o systemd-tty-ask-password-agent \
        "$systemdsystemunitdir/systemd-ask-password-console.path" \
        "$systemdsystemunitdir/systemd-ask-password-console.service"
    for _file in "$systemdsystemunitdir"/systemd-ask-password-console.{path,service}; do
        _latchkey_has "$_file" || _latchkey_missing "$_file" "it comes with systemd's package"
    done
    _latchkey_has {/usr,}/bin/systemd-tty-ask-password-agent \
        || _latchkey_missing systemd-tty-ask-password-agent "it comes with systemd's package"

    inst_simple "$moddir/latchkey-lib.sh" /lib/latchkey-lib.sh
    inst_hook emergency 10 "$moddir/latchkey-emergency.sh"
    inst_hook shutdown-emergency 10 "$moddir/latchkey-emergency.sh"
}

_latchkey_install_hooks() {
    inst_simple "$moddir/latchkey-lib.sh" /lib/latchkey-lib.sh
    inst_hook pre-trigger 10 "$moddir/latchkey-start.sh"
    inst_hook initqueue 10 "$moddir/latchkey-start.sh"
    inst_hook initqueue/settled 10 "$moddir/latchkey-patience.sh"
    inst_hook initqueue/finished 10 "$moddir/latchkey-finished.sh"
    inst_hook pre-mount 10 "$moddir/latchkey-result.sh"
    inst_hook emergency 10 "$moddir/latchkey-emergency.sh"
    inst_hook cleanup 99 "$moddir/latchkey-keep-run.sh"
    dracut_need_initqueue
}

# What is missing, for _latchkey_stop_if_missing: WHAT, and where it is to be had.
_latchkey_missing() {
    dfatal "latchkey: $1 is missing: $2"
    _latchkey_incomplete=yes
}

_latchkey_stop_if_missing() {
    [[ $_latchkey_incomplete ]] || return 0
    dfatal "latchkey: an initramfs without it could not unlock the machine, so none is made"
    exit 1
}

# The packages that files come in, as far as they are known by one name.
_latchkey_package() {
    case $1 in
        dmsetup) echo "install the package dmsetup (Fedora, openSUSE: device-mapper)" ;;
        libtss2-tcti-device.so.*) echo "install the package libtss2-tcti-device0 (Fedora: tpm2-tss)" ;;
        libtss2-esys.so.*) echo "install the package libtss2-esys-3.0.2-0 (Fedora: tpm2-tss, openSUSE: libtss2-esys0)" ;;
        libtss2-tctildr.so.*) echo "install the package libtss2-tctildr0 (Fedora: tpm2-tss)" ;;
        libtss2-mu.so.*) echo "install the package libtss2-mu0 (Fedora: tpm2-tss)" ;;
        libtss2-sys.so.*) echo "install the package libtss2-sys1 (Fedora: tpm2-tss)" ;;
        libcryptsetup.so.*) echo "install the package libcryptsetup12 (Fedora: cryptsetup-libs)" ;;
        libgcc_s.so.*) echo "install the package libgcc-s1 (Fedora: libgcc)" ;;
        *) echo "install the package that it comes in (dpkg -S $1, rpm -q --whatprovides $1)" ;;
    esac
}

# The path in the image of library SONAME.
_latchkey_in_image() {
    local _dir
    for _dir in $libdirs; do
        [[ -e $initdir$_dir/$1 ]] && echo "$_dir/$1" && return 0
    done
    return 1
}

# Whether one of the paths is in the image.
_latchkey_has() {
    local _file
    for _file in "$@"; do
        [[ -e $initdir$_file ]] && return 0
    done
    return 1
}

# Whether one of the modules is in the image, or built into its kernel.
_latchkey_kernel_has() {
    local _module _pattern
    for _module in "$@"; do
        _pattern=${_module//_/[-_]}
        grep -qs "/$_pattern\.ko" "$srcmods/modules.builtin" && return 0
        [[ -d $initdir/lib/modules/$kernel ]] || continue
        [[ $(find "$initdir/lib/modules/$kernel/" -name "$_pattern.ko*" -print -quit) ]] && return 0
    done
    return 1
}

# Lets the loader resolve FILE of the image with the image's libraries first: what comes from elsewhere is not in the image.
_latchkey_check_libraries() {
    local _dir _path='' _name _arrow _found _rest
    [[ $1 && -e $initdir$1 ]] || return 0
    for _dir in $libdirs; do
        _path+=${_path:+:}$initdir$_dir
    done
    while read -r _name _arrow _found _rest; do
        if [[ $_arrow == "=>" ]]; then
            [[ $_found == "$initdir"/* ]] || _latchkey_missing "$_name, which ${1##*/} is linked to," "$(_latchkey_package "$_name")"
        elif [[ $_name == /* && $_name != *: ]]; then
            [[ -e $initdir$_name ]] || _latchkey_missing "$_name, which ${1##*/} is started by," "it comes with the C library's package"
        fi
    done < <(LD_LIBRARY_PATH=$_path "${DRACUT_LDD:-ldd}" "$initdir$1" 2> /dev/null)
}
