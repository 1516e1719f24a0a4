# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_latchkey_global_optspecs
	string join \n cloud-config= h/help V/version
end

function __fish_latchkey_needs_command
	# Figure out if the current invocation already has a command.
	set -l cmd (commandline -opc)
	set -e cmd[1]
	argparse -s (__fish_latchkey_global_optspecs) -- $cmd 2>/dev/null
	or return
	if set -q argv[1]
		# Also print the command, so this can be used to figure out what it is.
		echo $argv[1]
		return 1
	end
	return 0
end

function __fish_latchkey_using_subcommand
	set -l cmd (__fish_latchkey_needs_command)
	test -z "$cmd"
	and return 1
	contains -- $cmd[1] $argv
end

complete -c latchkey -n "__fish_latchkey_needs_command" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_needs_command" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_needs_command" -s V -l version -d 'Print version'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "init" -d 'Print a new ikto.json with an address drawn at random'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "agent" -d 'Be a member of the mesh. SIGTERM ends the agent and leaves the mesh up, SIGHUP has it read its configuration again'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "info" -d 'Print this node and the others as Ikto does, from the socket of either agent'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "status" -d 'Show this node, the registry and the peers. Needs CAP_NET_ADMIN'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "leave" -d 'Leave the mesh: delete this node\'s own record from the registry. Stop the agent first'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "registry" -d 'What an operator does to the registry'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "handover" -d 'The identity handed over by the initramfs, as latchkey.service handles it'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand init" -s m -l mesh-ip-net -d 'The whole mesh' -r
complete -c latchkey -n "__fish_latchkey_using_subcommand init" -s p -l subnet-prefix-length -d 'Length of the prefix that the node owns; longer than the mesh\'s' -r
complete -c latchkey -n "__fish_latchkey_using_subcommand init" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand init" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -s c -l config -d 'Take everything from this ikto.json, in the place of the cloud-config' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -s s -l socket -d 'The admin service\'s socket. Default: /tmp/ikto.sock with --config, else /run/latchkey/agent/admin.sock' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -l metrics -d 'Serve Prometheus metrics on http://ADDRESS:PORT/metrics' -r
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -l down -d 'Take the device away instead, and with it the key of this boot. Stop the service first'
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand info" -l socket -d 'The agent\'s socket. Default: /tmp/ikto.sock, or where there is none that of latchkey.service' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand info" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand info" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -s c -l config -d 'Take everything from this ikto.json, in the place of the cloud-config' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -l socket -d 'The agent\'s socket. Default: as the agent\'s own' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -l boot -d 'Show this boot instead: how the disk was opened or why it was not, step by step, and when the mesh was up. Needs root'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -l json -d 'As JSON'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -s v -l verbose -d 'Show all there is of each peer, as wg(8) does'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -s w -l watch -d 'Show it again whenever it has changed, until interrupted'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand leave" -s c -l config -d 'Take everything from this ikto.json, in the place of the cloud-config' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand leave" -s s -l socket -d 'The socket that the agent would have, to see that it is stopped. Default: as the agent\'s own' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand leave" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand leave" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and not __fish_seen_subcommand_from create help" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and not __fish_seen_subcommand_from create help" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and not __fish_seen_subcommand_from create help" -f -a "create" -d 'Create the bucket with the settings that a mesh needs. One that is there is compared, never changed'
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and not __fish_seen_subcommand_from create help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and __fish_seen_subcommand_from create" -s c -l config -d 'Take everything from this ikto.json, in the place of the cloud-config' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and __fish_seen_subcommand_from create" -l replicas -d 'Servers that hold a copy: 1, 3 or 5' -r
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and __fish_seen_subcommand_from create" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and __fish_seen_subcommand_from create" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and __fish_seen_subcommand_from help" -f -a "create" -d 'Create the bucket with the settings that a mesh needs. One that is there is compared, never changed'
complete -c latchkey -n "__fish_latchkey_using_subcommand registry; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -f -a "check" -d 'Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for ExecCondition=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -f -a "forget" -d 'Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from check" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from check" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from forget" -l credentials -d 'Where systemd put the credential' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from forget" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -f -a "(__fish_complete_directories)"
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from forget" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from help" -f -a "check" -d 'Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for ExecCondition=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from help" -f -a "forget" -d 'Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "init" -d 'Print a new ikto.json with an address drawn at random'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "agent" -d 'Be a member of the mesh. SIGTERM ends the agent and leaves the mesh up, SIGHUP has it read its configuration again'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "info" -d 'Print this node and the others as Ikto does, from the socket of either agent'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "status" -d 'Show this node, the registry and the peers. Needs CAP_NET_ADMIN'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "leave" -d 'Leave the mesh: delete this node\'s own record from the registry. Stop the agent first'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "registry" -d 'What an operator does to the registry'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "handover" -d 'The identity handed over by the initramfs, as latchkey.service handles it'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from init agent info status leave registry handover help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and __fish_seen_subcommand_from registry" -f -a "create" -d 'Create the bucket with the settings that a mesh needs. One that is there is compared, never changed'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and __fish_seen_subcommand_from handover" -f -a "check" -d 'Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for ExecCondition=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and __fish_seen_subcommand_from handover" -f -a "forget" -d 'Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=)'
