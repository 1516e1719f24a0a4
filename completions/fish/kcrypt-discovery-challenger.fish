# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_kcrypt_discovery_challenger_global_optspecs
	string join \n debug config= tpm-device= h/help V/version
end

function __fish_kcrypt_discovery_challenger_needs_command
	# Figure out if the current invocation already has a command.
	set -l cmd (commandline -opc)
	set -e cmd[1]
	argparse -s (__fish_kcrypt_discovery_challenger_global_optspecs) -- $cmd 2>/dev/null
	or return
	if set -q argv[1]
		# Also print the command, so this can be used to figure out what it is.
		echo $argv[1]
		return 1
	end
	return 0
end

function __fish_kcrypt_discovery_challenger_using_subcommand
	set -l cmd (__fish_kcrypt_discovery_challenger_needs_command)
	test -z "$cmd"
	and return 1
	contains -- $cmd[1] $argv
end

complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -l tpm-device -d 'the TPM: device, unix socket or TCTI string, instead of what is configured or found' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -s V -l version -d 'Print version'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "unlock" -d 'open the configured volumes; what the initramfs calls'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "encrypt" -d 'encrypt partitions in place, keeping what is on them; what an installer calls'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "rekey" -d 'change the machine\'s key of a volume; the old one stays until the new one has opened it'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "doctor" -d 'check everything an unlock needs, and say what is wrong and what to do'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "get" -d 'print the passphrase of a volume, without a newline'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "info" -d 'show the TPM: maker, pubhash, EK certificate, handles, lockout, PCRs'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "checknv" -d 'check that the TPM holds a passphrase of offline mode and releases it'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "readnv" -d 'print the passphrase of offline mode, without a newline'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "cleanup" -d 'remove the passphrase of offline mode from the TPM: volumes that it opens stay closed for good'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "discovery.password" -d 'kcrypt\'s plugin: an event on stdin, the answer on stdout'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand unlock" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand unlock" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand unlock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand encrypt" -l device -d 'the partition, instead of the one that has the label' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand encrypt" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand encrypt" -l recovery-key -d 'make a recovery key as well, and print it this once, on a terminal with a QR code'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand encrypt" -l new -d 'drop what is on the partition and make a new file system'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand encrypt" -l dry-run -d 'say what would be done with each partition, and change nothing'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand encrypt" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand encrypt" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand rekey" -l device -d 'the partition, instead of the one that has the label' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand rekey" -l wait -d 'wait so long for the key server to release another passphrase (default 0)' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand rekey" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand rekey" -l key-stdin -d 'read another key of the volume from stdin, or ask for it on a terminal'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand rekey" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand rekey" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand doctor" -l tpm-device -d 'the TPM: device, unix socket or TCTI string, instead of what is configured or found' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand doctor" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand doctor" -l unlock-test -d 'also get each volume\'s passphrase as a boot does, and try it; nothing is mapped'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand doctor" -l json -d 'as JSON'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand doctor" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l partition-label -d 'the volume\'s label' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l partition-name -d 'its kernel name (sda3), for a server that goes by it' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l partition-uuid -d 'its partition UUID, likewise' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l attempts -d 'give up after so many attempts at a server; in any case at the configured deadline (default: at that alone)' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l challenger-server -d 'key server, instead of the configured ones; may be repeated' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l certificate -d 'PEM certificates to trust beside the system\'s: a file, or the PEM text itself' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l tpm-device -d 'the TPM: device, unix socket or TCTI string, instead of what is configured or found' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l mdns -d 'find the server\'s .local name by multicast DNS'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand get" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand info" -l pcrs -d 'show these PCRs of the SHA-256 bank (default 0,7,11)' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand info" -l nv-index -d 'NV index of the sealed passphrase (default: as configured, or 0x1500000)' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand info" -l tpm-device -d 'the TPM: device, unix socket or TCTI string, instead of what is configured or found' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand info" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand info" -l json -d 'as JSON'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand info" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand info" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand checknv" -l nv-index -d 'NV index of the sealed passphrase (default: as configured, or 0x1500000)' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand checknv" -l tpm-device -d 'the TPM: device, unix socket or TCTI string, instead of what is configured or found' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand checknv" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand checknv" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand checknv" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand readnv" -l nv-index -d 'NV index of the sealed passphrase (default: as configured, or 0x1500000)' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand readnv" -l tpm-device -d 'the TPM: device, unix socket or TCTI string, instead of what is configured or found' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand readnv" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand readnv" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand readnv" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -l nv-index -d 'NV index of the sealed passphrase (default: as configured, or 0x1500000)' -r -f
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -l tpm-device -d 'the TPM: device, unix socket or TCTI string, instead of what is configured or found' -r -F
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -l keys -d 'also the key that sealed it (c_index), and with --force EK and SRK; all are made again when needed'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -l force -d 'also what other programs may use, or what is not as kcrypt makes it'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -l i-know-what-i-am-doing -d 'do not ask'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand cleanup" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand discovery.password" -l config -d 'read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated' -r -f -a "(__fish_complete_directories)"
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand discovery.password" -l debug -d 'say every step'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand discovery.password" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "unlock" -d 'open the configured volumes; what the initramfs calls'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "encrypt" -d 'encrypt partitions in place, keeping what is on them; what an installer calls'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "rekey" -d 'change the machine\'s key of a volume; the old one stays until the new one has opened it'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "doctor" -d 'check everything an unlock needs, and say what is wrong and what to do'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "get" -d 'print the passphrase of a volume, without a newline'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "info" -d 'show the TPM: maker, pubhash, EK certificate, handles, lockout, PCRs'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "checknv" -d 'check that the TPM holds a passphrase of offline mode and releases it'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "readnv" -d 'print the passphrase of offline mode, without a newline'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "cleanup" -d 'remove the passphrase of offline mode from the TPM: volumes that it opens stay closed for good'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "discovery.password" -d 'kcrypt\'s plugin: an event on stdin, the answer on stdout'
complete -c kcrypt-discovery-challenger -n "__fish_kcrypt_discovery_challenger_using_subcommand help; and not __fish_seen_subcommand_from unlock encrypt rekey doctor get info checknv readnv cleanup discovery.password help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
