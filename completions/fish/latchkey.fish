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

complete -c latchkey -n "__fish_latchkey_needs_command" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -F
complete -c latchkey -n "__fish_latchkey_needs_command" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_needs_command" -s V -l version -d 'Print version'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "agent" -d 'Bring the WireGuard device up and keep it as it should be. SIGTERM ends the agent and leaves the device up'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "status" -d 'Show this node: key, address, identity, peers. Needs CAP_NET_ADMIN'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "handover" -d 'The identity handed over by the initramfs, as latchkey.service handles it'
complete -c latchkey -n "__fish_latchkey_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -l down -d 'Take the device away instead, and with it the key of this boot. Stop the service first'
complete -c latchkey -n "__fish_latchkey_using_subcommand agent" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -l boot -d 'Show this boot instead: how the disk was opened or why it was not, step by step. Needs root'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -l json -d 'As JSON'
complete -c latchkey -n "__fish_latchkey_using_subcommand status" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -f -a "check" -d 'Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for ExecCondition=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -f -a "forget" -d 'Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and not __fish_seen_subcommand_from check forget help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from check" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from check" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from forget" -l credentials -d 'Where systemd put the credential' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from forget" -l cloud-config -d 'Read cloud-config below this directory instead; may be given more than once' -r -F
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from forget" -s h -l help -d 'Print help'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from help" -f -a "check" -d 'Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for ExecCondition=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from help" -f -a "forget" -d 'Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand handover; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from agent status handover help" -f -a "agent" -d 'Bring the WireGuard device up and keep it as it should be. SIGTERM ends the agent and leaves the device up'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from agent status handover help" -f -a "status" -d 'Show this node: key, address, identity, peers. Needs CAP_NET_ADMIN'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from agent status handover help" -f -a "handover" -d 'The identity handed over by the initramfs, as latchkey.service handles it'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and not __fish_seen_subcommand_from agent status handover help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and __fish_seen_subcommand_from handover" -f -a "check" -d 'Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for ExecCondition=)'
complete -c latchkey -n "__fish_latchkey_using_subcommand help; and __fish_seen_subcommand_from handover" -f -a "forget" -d 'Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=)'
