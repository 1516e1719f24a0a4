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
complete -c latchkey-kms -n "__fish_latchkey_kms_needs_command" -f -a "audit" -d 'Looks at the audit log'
complete -c latchkey-kms -n "__fish_latchkey_kms_needs_command" -f -a "volume" -d 'Shows and changes the SealedVolumes of a store. A running server sees changes within a second'
complete -c latchkey-kms -n "__fish_latchkey_kms_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l store -d 'Directory of YAML manifests (SealedVolume, Secret); new Secrets are written into it' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l listen -d 'Address and port to listen on; port 0 takes a free one and says which' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l tls-cert -d 'PEM file with the server\'s certificate, followed by the intermediate ones' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l tls-key -d 'PEM file with the private key of the certificate' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l metrics-listen -d 'Address and port for /metrics (Prometheus), /healthz and /readyz. Without it there are no metrics; the other two are also on the main port' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l mdns -d 'Answers mDNS by itself, as NAME.local and as a `_kcrypt._tcp` service, on every interface: machines with `mdns: true` then find the server by `challenger_server: http://NAME.local` (https with TLS)' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l audit -d 'File for the audit log: a chain of JSON lines, one for each request and each change by an operator. Lines are synced to the disk some milliseconds after they happened' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l max-connections -d 'Most connections at once. For one more, the oldest is closed that has proved nothing yet, of the address that has the most of these' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l max-connections-per-address -d 'Most connections at once of one address (IPv4 address, IPv6 /64); behind a NAT all machines have one' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l address-rate -d 'Requests per minute that one address may make; 0 is no limit. Beyond it: 429 with Retry-After' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l address-burst -d 'Requests that one address may make at once, after a rest. A machine makes up to six to install or boot, so the default lets 3,000 machines behind one NAT boot at once' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l machine-rate -d 'Requests per minute that one machine (TPM hash) may make; 0 is no limit. Beyond it: 429 with Retry-After' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l machine-burst -d 'Requests that one machine may make at once, after a rest' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l namespace -d 'Namespace of the volumes and Secrets that are made for machines nobody has written a volume for' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l pcrs -d 'PCRs that a machine\'s quote may have, of 0 to 15. Volumes are held to those of their first quote; which ones these are is the client\'s choice' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l handshake-timeout -d 'Seconds a peer has for its TLS handshake, and again for its HTTP request' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l message-timeout -d 'Seconds a machine has for each message: its TPM may need most of a minute' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l stop-timeout -d 'Seconds that running exchanges have to finish when the server is told to stop' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -l allow-empty-quote-nonce -d 'Take quotes without a nonce, as clients before generation 2 bound them to the exchange. Such a quote may be an old one, of before the machine was tampered with'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand serve" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand audit; and not __fish_seen_subcommand_from verify help" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand audit; and not __fish_seen_subcommand_from verify help" -f -a "verify" -d 'Checks that an audit log is whole, and prints how many lines it has, the first and the last, or where it breaks'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand audit; and not __fish_seen_subcommand_from verify help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand audit; and __fish_seen_subcommand_from verify" -l contains -d 'A line that must be there: its number and hash, as the server logs them when it starts and stops, or as this command printed them before. Without it nobody can know whether lines were cut off at the end' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand audit; and __fish_seen_subcommand_from verify" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand audit; and __fish_seen_subcommand_from help" -f -a "verify" -d 'Checks that an audit log is whole, and prints how many lines it has, the first and the last, or where it breaks'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand audit; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -f -a "list" -d 'Lists the volumes, one per line'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -f -a "show" -d 'Shows all that is known of a volume, but no passphrase'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -f -a "quarantine" -d 'Releases nothing to the machine any more'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -f -a "release" -d 'Ends a quarantine'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -f -a "forget" -d 'Removes the volume from its file. Its Secrets stay unless --with-secrets says otherwise'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -f -a "reset-pcrs" -d 'Lets the machine\'s next boot say which PCR values are right, as after a change of its firmware'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and not __fish_seen_subcommand_from list show quarantine release forget reset-pcrs help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from list" -l store -d 'Directory of YAML manifests, as for `serve`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from list" -l namespace -d 'Only this namespace' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from list" -l json -d 'As JSON, for programs'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from show" -l store -d 'Directory of YAML manifests, as for `serve`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from show" -l namespace -d 'Only this namespace' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from show" -l json -d 'As JSON, for programs'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from quarantine" -l store -d 'Directory of YAML manifests, as for `serve`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from quarantine" -l namespace -d 'Only this namespace' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from quarantine" -l audit -d 'Audit log that the change is added to: the file of `serve --audit`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from quarantine" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from release" -l store -d 'Directory of YAML manifests, as for `serve`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from release" -l namespace -d 'Only this namespace' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from release" -l audit -d 'Audit log that the change is added to: the file of `serve --audit`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from release" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from forget" -l store -d 'Directory of YAML manifests, as for `serve`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from forget" -l namespace -d 'Only this namespace' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from forget" -l audit -d 'Audit log that the change is added to: the file of `serve --audit`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from forget" -l with-secrets -d 'Removes its Secrets as well: without them the machine\'s disk opens with its recovery passphrase only, or never'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from forget" -l yes -d 'Does not ask'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from forget" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from reset-pcrs" -l store -d 'Directory of YAML manifests, as for `serve`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from reset-pcrs" -l namespace -d 'Only this namespace' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from reset-pcrs" -l audit -d 'Audit log that the change is added to: the file of `serve --audit`' -r -F
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from reset-pcrs" -l pcr -d 'Only this PCR; may be given several times' -r
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from reset-pcrs" -s h -l help -d 'Print help'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "list" -d 'Lists the volumes, one per line'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "show" -d 'Shows all that is known of a volume, but no passphrase'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "quarantine" -d 'Releases nothing to the machine any more'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "release" -d 'Ends a quarantine'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "forget" -d 'Removes the volume from its file. Its Secrets stay unless --with-secrets says otherwise'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "reset-pcrs" -d 'Lets the machine\'s next boot say which PCR values are right, as after a change of its firmware'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand volume; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and not __fish_seen_subcommand_from serve audit volume help" -f -a "serve" -d 'Answers machines until it is told to stop'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and not __fish_seen_subcommand_from serve audit volume help" -f -a "audit" -d 'Looks at the audit log'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and not __fish_seen_subcommand_from serve audit volume help" -f -a "volume" -d 'Shows and changes the SealedVolumes of a store. A running server sees changes within a second'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and not __fish_seen_subcommand_from serve audit volume help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and __fish_seen_subcommand_from audit" -f -a "verify" -d 'Checks that an audit log is whole, and prints how many lines it has, the first and the last, or where it breaks'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "list" -d 'Lists the volumes, one per line'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "show" -d 'Shows all that is known of a volume, but no passphrase'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "quarantine" -d 'Releases nothing to the machine any more'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "release" -d 'Ends a quarantine'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "forget" -d 'Removes the volume from its file. Its Secrets stay unless --with-secrets says otherwise'
complete -c latchkey-kms -n "__fish_latchkey_kms_using_subcommand help; and __fish_seen_subcommand_from volume" -f -a "reset-pcrs" -d 'Lets the machine\'s next boot say which PCR values are right, as after a change of its firmware'
