# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_latchkey_kms_global_optspecs
	string join \n h/help V/version
end

function __fish_latchkey_kms_needs_command
	# Figure out if the current invocation already has a command.
	set -l cmd (commandline -opc)
	set -e cmd[1]
	argparse -s (__fish_latchkey_kms_global_optspecs) -- $cmd 2>/dev/null
	or return
	if set -q argv[1]
		# Also print the command, so this can be used to figure out what it is.
		echo $argv[1]
		return 1
	end
	return 0
end

function __fish_latchkey_kms_using_subcommand
	set -l cmd (__fish_latchkey_kms_needs_command)
	test -z "$cmd"
	and return 1
	contains -- $cmd[1] $argv
end

complete -c latchkey-kms -n "__fish_latchkey_kms_needs_command" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_needs_command" -s V -l version -d 'Print version'
complete -c latchkey-kms -n "__fish_latchkey_kms_needs_command" -f -a "serve" -d 'Answers machines until it is told to stop'
complete -c latchkey-kms -n "__fish_latchkey_kms_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l store -d 'Directory of YAML manifests (SealedVolume, Secret); new Secrets are written into it' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l listen -d 'Address and port to listen on; port 0 takes a free one and says which' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l tls-cert -d 'PEM file with the server\'s certificate, followed by the intermediate ones' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l tls-key -d 'PEM file with the private key of the certificate' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l metrics-listen -d 'Address and port for /metrics (Prometheus), /healthz and /readyz. Without it there are no metrics; the other two are also on the main port' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l max-connections -d 'Most connections at once. For one more, the oldest is closed that has proved nothing yet, of the address that has the most of these' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l max-connections-per-address -d 'Most connections at once of one address (IPv4 address, IPv6 /64); behind a NAT all machines have one' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l address-rate -d 'Requests per minute that one address may make; 0 is no limit. Beyond it: 429 with Retry-After' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l address-burst -d 'Requests that one address may make at once, after a rest. A machine makes up to six to install or boot, so the default lets 3,000 machines behind one NAT boot at once' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l machine-rate -d 'Requests per minute that one machine (TPM hash) may make; 0 is no limit. Beyond it: 429 with Retry-After' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l machine-burst -d 'Requests that one machine may make at once, after a rest' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l handshake-timeout -d 'Seconds a peer has for its TLS handshake, and again for its HTTP request' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l message-timeout -d 'Seconds a machine has for each message: its TPM may need most of a minute' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l stop-timeout -d 'Seconds that running exchanges have to finish when the server is told to stop' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and not __fish_seen_subcommand_from serve help" -f -a "serve" -d 'Answers machines until it is told to stop'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and not __fish_seen_subcommand_from serve help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
