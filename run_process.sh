#!/usr/bin/env bash
# A whole run of B2-DiffuRL. In each stage run_sample.py samples images in groups of branches, run_select.py scores them and
# picks those to train on, and run_train.py updates the LoRA on them. run_eval.py judges now and then.
#
#     bash run_process.sh                                      # the default run
#     Preset=sd14 ExpName=my_run bash run_process.sh           # Stable Diffusion v1.4
#     bash run_process.sh --dry_run                            # check everything, say what would be done, and do nothing
#     bash run_process.sh --config.train.learning_rate=1e-3    # arguments are passed on to every script
#     bash run_process.sh --help                               # this text, the variables below, the presets
#
# To resume a run, give the same command again.
#
# The variables below can be set in the environment, as above, or here, between :- and }. An empty variable takes the
# preset's value. config/stage_process.py has every setting, also those without a variable.
set -euo pipefail
# A stream that is closed (>&-) would fail each command that writes, and its number would go to the next file that is opened.
( : >&1 ) 2> /dev/null || exec > /dev/null
( : >&2 ) || exec 2> /dev/null
export B2DIFFURL_STARTED_IN="$PWD"    # where the user's relative paths lie (b2diffurl/runtime/paths.py)
# A repository is worked in. An installed package, which has this script in a folder of its own, is only read.
Scripts="$(dirname "${BASH_SOURCE[0]}")/"
if [ -d "${Scripts}b2diffurl" ]; then cd "$Scripts"; Scripts=; fi
This="${Scripts:-$PWD/}${BASH_SOURCE[0]##*/}"

# fail SENTENCE REMEDY: end with both and exit code 2.
fail() {
    printf 'error: %s\n       %s\n' "$1" "$2" >&2
    exit 2
}
# variables: the name, comment and default of each variable below, separated by tabs.
variables() {
    sed -nE "s/^([A-Z][A-Za-z0-9_]*)=\"\\$\{[A-Za-z0-9_]*:-([^}]*)\}\" *# (.*)/\1"$'\t'"\3"$'\t'"\2/p" "$This"
}
Given="${Scripts:+b2diffurl run}"    # where the package is installed
for Argument in "$@"; do
    case "$Argument" in -h | -help | --help | --helpshort | --helpfull)
        {
            sed -n '2,/^set /s/^# \{0,1\}//p' "$This"
            printf '\nVariables:\n\n'
            variables | awk -F '\t' '{ printf "    %-16s %s%s\n", $1, $2, $3 == "" ? "" : " (default: " $3 ")" }'
            printf '\nconfig/stage_process.py:\n\n%s\n' "$(awk '/^"""/ && NR > 1 { exit } { sub(/^"""/, ""); print }' "${Scripts}config/stage_process.py")"
        } | sed "s/bash run_process\.sh/${Given:-&}/" 2> /dev/null || true    # | head ends it
        exit 0 ;;
    [A-Z]*=*)    # NumStep=20 behind the command is not in the environment
        if variables | cut -f 1 | grep -Fx -- "${Argument%%=*}" > /dev/null; then
            fail "$Argument is an argument here, and ${Argument%%=*} is a variable" \
                "Give it before the command: $(printf %q "$Argument") ${Given:-bash run_process.sh}"
        fi
    esac
done

Preset="${Preset:-shapes}"                # shapes, shapes_ddpo, sd14_nft, sd14, …: see config/stage_process.py
ExpName="${ExpName:-}"                    # name of the experiment: of its folder and its log
SavePath="${SavePath:-}"                  # folder of all experiments
ModelVersion="${ModelVersion:-}"          # base model: hub id, directory or .safetensors file
Reward="${Reward:-}"                      # a reward of docs/rewards.md, or package.module:function
RewardWeights="${RewardWeights:-}"        # weights of several rewards instead: "{'clip': 1.0, 'aesthetic': 0.1}"
Watch="${Watch:-}"                        # rewards that are logged but not trained on: pickscore,aesthetic
EvalEvery="${EvalEvery:-}"                # evaluate on held-out prompts after every so many stages; 0: only at the end
TrackWith="${TrackWith:-}"                # trackers: wandb, tensorboard, or wandb,tensorboard
PromptFile="${PromptFile:-}"              # file of training prompts
EvalPromptFile="${EvalPromptFile:-}"      # file of held-out prompts, on which checkpoints are judged
RandomPrompt="${RandomPrompt:-}"          # 1: draw prompts at random; 0: in the order of the file
Seed="${Seed:-}"                          # of all randomness in the experiment
StageCnt="${StageCnt:-}"                  # number of stages
Curriculum="${Curriculum:-}"              # which steps a stage trains: progressive, reversed, random, fixed, early, sliding
SplitStepLeft="${SplitStepLeft:-}"        # trained steps in the first stage
SplitStepRight="${SplitStepRight:-}"      # trained steps in the last stage
SplitTime="${SplitTime:-}"                # images in a group (siblings)
Sampling="${Sampling:-}"                  # branch: siblings share the steps before the trained ones; or independent
NumStep="${NumStep:-}"                    # sampler steps
BatchCnt="${BatchCnt:-}"                  # sampling batches in a stage
History_Cnt="${History_Cnt:-}"            # earlier stages that count in a prompt's mean and standard deviation
Advantage="${Advantage:-}"                # subtract the mean reward of the prompt, or of the group: prompt, group
Selection="${Selection:-}"                # train on pairs (best and worst of a group), or on all
PosThreshold="${PosThreshold:-}"          # keep the best of a group if its normalised reward is at least this
NegThreshold="${NegThreshold:-}"          # keep the worst of a group if its normalised reward is below this
Objective="${Objective:-}"                # ddpo, reinforce, dpok, d3po, nft, awm
TrainEpoch="${TrainEpoch:-}"              # passes over the selected images of a stage
AccStep="${AccStep:-}"                    # gradient accumulation: an update takes train.batch_size * AccStep trajectories
LR="${LR:-}"                              # learning rate
Beta1="${Beta1:-}"                        # factor of positive advantages
Beta2="${Beta2:-}"                        # factor of negative advantages
SaveInterval="${SaveInterval:-}"          # epochs between checkpoints
Dev_Id="${Dev_Id:-}"                      # number of the CUDA device
Resident="${Resident:-}"                  # 1: one process for the whole run, which starts once; 0: one for each script; same results
NumProcesses="${NumProcesses:-}"          # processes on this machine, one for each GPU; torchrun starts them
NumMachines="${NumMachines:-1}"           # machines; run this script on each of them, on a shared disk
MachineRank="${MachineRank:-0}"           # number of this machine: 0, 1, …
MainProcessIp="${MainProcessIp:-}"        # address of machine 0
MainProcessPort="${MainProcessPort:-29500}"    # a free port of machine 0
Launcher="${Launcher:-}"                  # starts the scripts instead of torchrun: accelerate launch --config_file=cluster.yaml
Python="${Python:-}"                      # the interpreter; python, or python3 where there is no python

# A variable that differs from one of these only in case or underscores has no effect.
compgen -e | awk -F '\t' '
    function plain(name) { gsub("_", "", name); return tolower(name) }
    NR == FNR { if ($1 != "Python") ours[plain($1)] = $1; next }
    plain($1) in ours && $1 != ours[plain($1)] {
        print "warning: " $1 " is set, which has no effect here; the variable is " ours[plain($1)]
    }' <(variables) - >&2

# switch NAME: make a variable that is yes or no 1 or 0; empty it stays.
switch() {
    case "${!1}" in
        "") ;;
        1 | [Yy]es | YES | [Tt]rue | TRUE | [Oo]n | ON) printf -v "$1" 1 ;;
        0 | [Nn]o | NO | [Ff]alse | FALSE | [Oo]ff | OFF) printf -v "$1" 0 ;;
        *) fail "$1 is '${!1}'; it is 1 (yes) or 0 (no)" "Mend it and run the same command again." ;;
    esac
}
switch Resident
switch RandomPrompt

# From the variables make the flags that every script is given.
Flags=("--config=config/stage_process.py:${Preset}")
# set_flag KEY VALUE: add --config.KEY=VALUE, unless VALUE is empty.
set_flag() { if [ -n "$2" ]; then Flags+=("--config.$1=$2"); fi; }
# set_list KEY a,b: the same for a list, which Python reads as ('a','b',).
set_list() {
    local names="${2// /}" between="','"
    if [ -n "$names" ]; then set_flag "$1" "('${names//,/$between}',)"; fi
}
set_flag exp_name "$ExpName"
set_flag save_path "$SavePath"
set_flag pretrained.model "$ModelVersion"
set_flag reward.name "$Reward"
set_flag reward.weights "$RewardWeights"
set_list reward.watch "$Watch"
set_flag eval.every "$EvalEvery"
set_list track_with "$TrackWith"
set_flag prompt_file "$PromptFile"
set_flag eval.prompt_file "$EvalPromptFile"
set_flag prompt_random_choose "$RandomPrompt"
set_flag seed "$Seed"
set_flag stage_cnt "$StageCnt"
set_flag curriculum "$Curriculum"
set_flag split_step_left "$SplitStepLeft"
set_flag split_step_right "$SplitStepRight"
set_flag split_time "$SplitTime"
set_flag sampling "$Sampling"
set_flag sample.num_steps "$NumStep"
set_flag sample.num_batches_per_epoch "$BatchCnt"
set_flag selection.history_cnt "$History_Cnt"
set_flag selection.advantage "$Advantage"
set_flag selection.images "$Selection"
set_flag selection.pos_threshold "$PosThreshold"
set_flag selection.neg_threshold "$NegThreshold"
set_flag train.objective "$Objective"
set_flag train.num_epochs "$TrainEpoch"
set_flag train.gradient_accumulation_steps "$AccStep"
set_flag train.learning_rate "$LR"
set_flag train.beta1 "$Beta1"
set_flag train.beta2 "$Beta2"
set_flag train.save_interval "$SaveInterval"
set_flag dev_id "$Dev_Id"
Flags+=("$@")    # after the variables, so that arguments win over them

# Check the numbers of processes and machines here, because bash computes with them.
for Number in "${NumProcesses:-1}" "$NumMachines" "$MachineRank" "$MainProcessPort"; do
    if [[ ! "$Number" =~ ^(0|[1-9][0-9]{0,4})$ ]]; then
        fail "NumProcesses, NumMachines, MachineRank and MainProcessPort are whole numbers below 100000, not '$Number'" \
            "Mend it and run the same command again."
    fi
done
if [ -z "$Launcher" ] && [ "$MachineRank" -ge "$NumMachines" ]; then
    fail "MachineRank is $MachineRank; with NumMachines=$NumMachines it is at least 0 and below that" \
        "Mend it and run the same command again."
fi
if [ "$NumMachines" -gt 1 ] && [ -z "$MainProcessIp$Launcher" ]; then
    fail "NumMachines is $NumMachines; MainProcessIp must be machine 0's address" "Give it and run the same command again."
fi

# The interpreter, and whether it can run this.
if [ -z "$Python" ]; then Python=$(command -v python || command -v python3 || true); fi
if [ -z "$Python" ]; then fail "there is neither python nor python3" "Install Python 3.11 or newer, or give one by Python=PATH."; fi
Lacks=$("$Python" -c 'import sys
if sys.version_info < (3, 11): sys.exit(print("is Python %d.%d; 3.11 or newer is needed" % sys.version_info[:2]))
from importlib.util import find_spec
lacks = [one for one in ("torch", "diffusers", "transformers", "ml_collections") if not find_spec(one)]
if lacks: print("lacks " + ", ".join(lacks))') || fail "$Python cannot be run" "Give an interpreter by Python=PATH."
case "$Lacks" in
    lacks*) fail "$Python $Lacks" "Install what is missing: $Python -m pip install -r requirements.txt" ;;
    ?*) fail "$Python $Lacks" "Give another by Python=PATH." ;;
esac

# Launch: what starts a phase. One process is the plain interpreter, several are started by torchrun.
Launch=("$Python")
if [ -n "$Launcher" ]; then
    read -ra Launch <<< "$Launcher"
elif [ "${NumProcesses:-1}" -gt 1 ] || [ "$NumMachines" -gt 1 ]; then
    Launch=("$Python" -m torch.distributed.run --nproc_per_node="${NumProcesses:-1}")
    if [ "$NumMachines" -gt 1 ]; then
        Launch+=(--nnodes="$NumMachines" --node_rank="$MachineRank")
        Launch+=(--master_addr="$MainProcessIp" --master_port="$MainProcessPort" --rdzv_conf=timeout=7200)
    else
        Launch+=(--standalone)
    fi
fi
if [ -n "$NumProcesses" ]; then set_flag num_processes $((NumProcesses * NumMachines)); fi

# run COMMAND…: run it in the background and wait. During `wait` bash runs a trap at once; during a foreground command only when that has ended.
# Descriptor 3 is the list of calls (see below), which is no business of the command's.
run() {
    "$@" 3<&- &
    wait $! || return $?
}
# stop CODE: on a signal, stop the script at work, wait until it has ended, and exit with CODE.
stop() {
    trap '' TERM INT HUP    # a second signal must not interrupt this
    kill $(jobs -pr) 2> /dev/null || true
    wait || true
    echo "stopped; to go on, run the same command again" >&2
    exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT
trap 'stop 129' HUP

# The lock of the experiment belongs to this process ($$), and the scripts work under it; 0 on machines that take no lock.
# See b2diffurl/experiment/lock.py.
B2DIFFURL_RUN=$$
if [ "$MachineRank" -gt 0 ]; then B2DIFFURL_RUN=0; fi
export B2DIFFURL_RUN
# What is left here of another program's run is not this one's: torchrun tells its processes who they are.
if [ -z "$Launcher" ]; then unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE; fi
PlanFolder=$(mktemp -d)
PlanFile="$PlanFolder/calls"
Folder= Whole=
# What start has written, once it is whole. It is kept in variables, because a run may outlive its temporary files.
read_list() {
    if [ "$(tail -n 1 "$PlanFile" 2> /dev/null)" != end ]; then return 0; fi
    Whole=1 Folder=$(sed -n $'1s/^folder\t//p' "$PlanFile")
    if grep -qx resident "$PlanFile"; then Resident=1; else Resident=0; fi
}
# At the end, delete the lock if it is ours, and the experiment's folder if it is empty.
leave() {
    if [ -z "$Whole" ]; then read_list; fi
    rm -rf "$PlanFolder"
    if grep -qs "\[\[$$," "$Folder/run.lock"; then rm -f "$Folder/run.lock"; rmdir "$Folder" 2> /dev/null || true; fi
}
trap leave EXIT
# start checks all settings, and writes what is to be done into a file: folder <tab> the experiment's folder, a line for each
# call of a script (call <tab> file that it needs <tab> script <tab> its flags, separated by tabs), and end.
# One process makes all calls itself: on the CPU, or where the user has said so.
Alone=no
if [ "$Resident" = 1 ]; then
    Alone=yes
elif [ -z "$Resident$Launcher" ] && [ "${NumProcesses:-1}" -eq 1 ] && [ "$NumMachines" -eq 1 ]; then
    Alone=auto
fi
"$Python" -m b2diffurl.start --calls="$PlanFile" --alone="$Alone" "${Flags[@]}" &
Start=$!
while [ -z "$Whole" ] && kill -0 "$Start" 2> /dev/null; do sleep 0.1; read_list; done
wait "$Start" || exit $?
if [ -z "$Whole" ]; then read_list; fi
if [ -z "$Whole" ]; then
    echo "error: b2diffurl.start has ended without a list of calls, so nothing can be run" >&2
    echo "       Something that it imports may have ended it: config/stage_process.py, or a module beside it." >&2
    exit 1
fi
if [ -z "$Folder" ]; then exit 0; fi    # it was --dry_run, which has shown the plan
if [ "$Resident" = 1 ]; then exit 0; fi    # start has made all calls
# The loop: every call in order. A call whose work is already done ends at once. The list is read from descriptor 3, so
# that the scripts cannot read from it.
while IFS=$'\t' read -r -a Call <&3; do
    if [ "${Call[0]}" != call ]; then continue; fi
    Needs="${Call[1]}" Script="${Call[2]}" Options=("${Call[@]:3}")
    # With Reward=file the run ends here, and goes on with the same command once the scores are there.
    if [ "$Needs" != . ] && [ ! -e "$Folder/$Needs" ]; then exit 0; fi
    if [ "$Script" != run_eval.py ]; then
        run "${Launch[@]}" "$Scripts$Script" "${Flags[@]}" "${Options[@]}"
    elif [ "$MachineRank" -eq 0 ]; then    # one process judges
        run "$Python" "$Scripts$Script" "${Flags[@]}" "${Options[@]}"
    fi
done 3< "$PlanFile"
