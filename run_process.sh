#!/usr/bin/env bash
# B2-DiffuRL: step backward through the timesteps, stage by stage. Each stage samples branches, scores them and picks
# contrast pairs, and updates the LoRA. To resume, run the same command again; with --dry_run it only says what it would do.
#
# Each variable can be set here or in the environment; an empty one takes the preset's value. Further arguments go to
# every script: bash run_process.sh --config.train.step_weight=none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

Preset="${Preset:-shapes}"                # of config/stage_process.py: shapes, sd14, sd14_10gb; b2, …
ExpName="${ExpName:-}"                    # names the experiment's folder and log
SavePath="${SavePath:-}"                  # where experiments lie
ModelVersion="${ModelVersion:-}"          # base model: hub id, directory or .safetensors file
Reward="${Reward:-}"                      # what is rewarded: a name of docs/rewards.md, or package.module:function
RewardWeights="${RewardWeights:-}"        # a mixture instead: "{'clip': 1.0, 'aesthetic': 0.1}"
Watch="${Watch:-}"                        # rewards scored and logged, never trained on: pickscore,aesthetic
EvalEvery="${EvalEvery:-}"                # stages from one evaluation on held-out prompts to the next; 0: none
TrackWith="${TrackWith:-}"                # wandb, tensorboard or wandb,tensorboard
PromptFile="${PromptFile:-}"              # training prompts
RandomPrompt="${RandomPrompt:-}"          # 1: at random, 0: in turn
Seed="${Seed:-}"
StageCnt="${StageCnt:-}"                  # stages
Curriculum="${Curriculum:-}"              # progressive, fixed (at SplitStepLeft), reversed, random
SplitStepLeft="${SplitStepLeft:-}"        # trained steps of the first stage
SplitStepRight="${SplitStepRight:-}"      # trained steps of the last stage
SplitTime="${SplitTime:-}"                # siblings in a group
Sampling="${Sampling:-}"                  # siblings: branch (of one prefix) or independent
NumStep="${NumStep:-}"                    # sampler steps
BatchCnt="${BatchCnt:-}"                  # sampling batches a stage
History_Cnt="${History_Cnt:-}"            # earlier stages that count in a prompt's mean and std
Advantage="${Advantage:-}"                # scores relative to prompt or group
Selection="${Selection:-}"                # pairs (best and worst sibling) or all
PosThreshold="${PosThreshold:-}"          # best sibling kept from this score on
NegThreshold="${NegThreshold:-}"          # worst sibling kept below this score
Objective="${Objective:-}"                # ddpo, reinforce, dpok, d3po
TrainEpoch="${TrainEpoch:-}"
AccStep="${AccStep:-}"                    # gradient accumulation
LR="${LR:-}"
Beta1="${Beta1:-}"                        # weight of positive advantages
Beta2="${Beta2:-}"                        # weight of negative advantages
SaveInterval="${SaveInterval:-}"          # epochs between checkpoints
Dev_Id="${Dev_Id:-}"                      # CUDA device
Resident="${Resident:-}"                  # 1: all stages in one process, which starts up and loads the model once; same bits
NumProcesses="${NumProcesses:-}"          # processes on this machine, one a GPU; each phase is started by torchrun
NumMachines="${NumMachines:-1}"           # machines, each of which runs this script, with the same shared disk
MachineRank="${MachineRank:-0}"           # this one's number: 0, 1, …
MainProcessIp="${MainProcessIp:-}"        # machine 0's address
MainProcessPort="${MainProcessPort:-29500}"
Launcher="${Launcher:-}"                  # what starts a script instead: accelerate launch --config_file=cluster.yaml

Flags=("--config=config/stage_process.py:${Preset}")
set_flag() { if [ -n "$2" ]; then Flags+=("--config.$1=$2"); fi; }
set_list() {    # a,b -> ('a','b',)
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
set_flag eval.history_cnt "$History_Cnt"
set_flag eval.advantage "$Advantage"
set_flag eval.selection "$Selection"
set_flag eval.pos_threshold "$PosThreshold"
set_flag eval.neg_threshold "$NegThreshold"
set_flag train.objective "$Objective"
set_flag train.num_epochs "$TrainEpoch"
set_flag train.gradient_accumulation_steps "$AccStep"
set_flag train.learning_rate "$LR"
set_flag train.beta1 "$Beta1"
set_flag train.beta2 "$Beta2"
set_flag train.save_interval "$SaveInterval"
set_flag dev_id "$Dev_Id"
Flags+=("$@")


for Number in "${NumProcesses:-1}" "$NumMachines" "$MachineRank" "$MainProcessPort"; do
    if [[ ! "$Number" =~ ^[0-9]+$ ]]; then
        echo "error: NumProcesses, NumMachines, MachineRank and MainProcessPort are whole numbers, not '$Number'" >&2
        exit 2
    fi
done
if [ "$NumMachines" -gt 1 ] && [ -z "$MainProcessIp$Launcher" ]; then
    echo "error: NumMachines is $NumMachines; MainProcessIp must be machine 0's address" >&2
    exit 2
fi

Launch=(python)
if [ -n "$Launcher" ]; then
    read -ra Launch <<< "$Launcher"
elif [ "${NumProcesses:-1}" -gt 1 ] || [ "$NumMachines" -gt 1 ]; then
    Launch=(python -m torch.distributed.run --nproc_per_node="${NumProcesses:-1}")
    if [ "$NumMachines" -gt 1 ]; then
        Launch+=(--nnodes="$NumMachines" --node_rank="$MachineRank")
        Launch+=(--master_addr="$MainProcessIp" --master_port="$MainProcessPort" --rdzv_conf=timeout=7200)
    else
        Launch+=(--standalone)
    fi
fi
if [ -n "$NumProcesses" ]; then set_flag num_processes $((NumProcesses * NumMachines)); fi

# What runs is told to stop when this script is. It leaves whole files, and no process stays behind.
run() {
    "$@" &
    wait $! || return $?
}
stop() {    # exit code
    trap '' TERM INT HUP
    kill $(jobs -pr) 2> /dev/null || true
    wait || true
    echo "stopped; to go on, run the same command again" >&2
    exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT
trap 'stop 129' HUP

B2DIFFURL_RUN=$$                   # whose turn it is: the scripts work for this process; see b2diffurl/experiment/lock.py
if [ "$MachineRank" -gt 0 ]; then B2DIFFURL_RUN=0; fi
export B2DIFFURL_RUN
PlanFile=$(mktemp)
Folder=
leave() {
    rm -f "$PlanFile"
    if grep -qs "\[\[$$," "$Folder/run.lock"; then rm -f "$Folder/run.lock"; rmdir "$Folder" 2> /dev/null || true; fi
}
trap leave EXIT
run python -m b2diffurl.start "${Flags[@]}" > "$PlanFile"    # checks everything, and writes the list of calls
if ! grep -q $'^call\t' "$PlanFile"; then
    cat "$PlanFile"                # --dry_run, or --dry_run=true: the plan for people, and no run
    exit 0
fi
Folder=$(sed -n 1p "$PlanFile")
sed 1d "$PlanFile" | grep -v $'^call\t' || true    # the plan in a line
if [ "$Resident" = 1 ]; then
    run python -m b2diffurl.resident "${Flags[@]}"
    exit 0
fi
while IFS=$'\t' read -r -a Call <&3; do
    if [ "${Call[0]}" != call ]; then continue; fi
    Needs="${Call[1]}" Script="${Call[2]}" Options=("${Call[@]:3}")
    if [ "$Needs" != . ] && [ ! -e "$Folder/$Needs" ]; then exit 0; fi    # Reward=file: scores are being made elsewhere
    if [ "$Script" != run_eval.py ]; then
        run "${Launch[@]}" "$Script" "${Flags[@]}" "${Options[@]}"
    elif [ "$MachineRank" -eq 0 ]; then
        run python "$Script" "${Flags[@]}" "${Options[@]}"
    fi
done 3< "$PlanFile"
