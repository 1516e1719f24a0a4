#!/bin/sh
# Prints the configuration file for swtpm_setup: a private authority that signs the EK certificates of test TPMs.
set -eu
. "$(dirname "$0")/lib.sh"

build() {
    mkdir -p "$1"
    # The files name each other by where they will be.
    cat >"$1/localca.conf" <<C
statedir = $product
signingkey = $product/signkey.pem
issuercert = $product/issuercert.pem
certserial = $product/certserial
C
    cat >"$1/localca.options" <<C
--platform-manufacturer Latchkey
--platform-version 1.0
--platform-model Test
C
    cat >"$1/setup.conf" <<C
create_certs_tool = /usr/bin/swtpm_localca
create_certs_tool_config = $product/localca.conf
create_certs_tool_options = $product/localca.options
active_pcr_banks = sha256
C
}

cached tpm-ca "$(key "$out" "$here/tpm-ca.sh")" "" build
echo "$product/setup.conf"
