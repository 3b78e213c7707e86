#!/usr/bin/env bash
# Sourced by stage.sh: how many processes a stage has, on which nodes, and the launcher that starts them.
#
#   launch PORT PROGRAM [flag...]      start PROGRAM on every process
#   wait_for_node_0 FILE               on the other nodes: wait until node 0 has written it, 10 minutes at most
#
#   LAUNCHER      deepspeed, torchrun or accelerate (default: deepspeed)
#   HOSTFILE      file of `NAME slots=GPUS` lines: deepspeed starts the nodes it names, by ssh (default: this machine)
#   NUM_NODES     nodes of torchrun and accelerate; the script is started on each of them (default: 1)
#   NODE_RANK     which of them this is, from 0 (default: 0); node 0 writes
#   MASTER_ADDR   address of node 0; required if NUM_NODES is above 1, the first name of HOSTFILE by default
#   MASTER_PORT   port of node 0 (default: a free one on one machine, 29500 on several)
set -euo pipefail

LAUNCHER="${LAUNCHER:-deepspeed}" HOSTFILE="${HOSTFILE:-}" NUM_NODES="${NUM_NODES:-1}" NODE_RANK="${NODE_RANK:-0}"
[[ "$LAUNCHER" =~ ^(deepspeed|torchrun|accelerate)$ ]] ||
  fail "LAUNCHER is '$LAUNCHER'; use deepspeed, torchrun or accelerate."
[[ "$NUM_NODES" =~ ^[1-9][0-9]*$ ]] || fail "NUM_NODES is '$NUM_NODES'; give the number of nodes, from 1."
[[ "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ ]] && ((NODE_RANK < NUM_NODES)) ||
  fail "NODE_RANK is '$NODE_RANK'; give a number from 0 to $((NUM_NODES - 1)), one below NUM_NODES."
if ((NUM_NODES > 1)); then
  [[ "$LAUNCHER" != deepspeed ]] ||
    fail "NUM_NODES is $NUM_NODES, but deepspeed takes its nodes from a file: set HOSTFILE, or LAUNCHER=torchrun."
  [[ -n "${MASTER_ADDR:-}" ]] || fail "MASTER_ADDR is not set; NUM_NODES $NUM_NODES needs the address of node 0."
fi

RANKS_PER_NODE="$NUM_GPUS"
PRECISION=(--bf16 True --tf32 True)
if ((VISIBLE_GPUS == 0)) && [[ -z "${DRY_RUN:-}" ]]; then
  [[ -z "$HOSTFILE" ]] ||
    fail "HOSTFILE is set, but this machine has no GPU to train on; start it on a node that has, or unset HOSTFILE."
  RANKS_PER_NODE="${NUM_RANKS_CPU:-2}"
  PRECISION=(--use_cpu True)
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  # glibc otherwise gives every large activation back to the system and has its pages cleared again
  export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864
fi
NUM_RANKS=$((RANKS_PER_NODE * NUM_NODES))

count_slots() { # hostfile: NUM_RANKS as deepspeed will count them
  local line name number=0 names=" " pattern='^([^[:space:]#]+)[[:space:]]+slots=([1-9][0-9]*)$'
  [[ "$LAUNCHER" == deepspeed ]] ||
    fail "HOSTFILE is read by deepspeed alone; for $LAUNCHER set NUM_NODES, NODE_RANK and MASTER_ADDR instead."
  [[ -f "$1" ]] || fail "HOSTFILE $1 is no file; name one with a line 'NAME slots=GPUS' for each node."
  NUM_RANKS=0
  while read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    [[ -n "$line" && "$line" != \#* ]] || continue
    [[ "$line" =~ $pattern ]] || fail "HOSTFILE $1, line $number is '$line'; write 'NAME slots=GPUS', GPUS from 1."
    name="${BASH_REMATCH[1]}"
    [[ "$names" != *" $name "* ]] || fail "HOSTFILE $1, line $number names $name again; give each node one line."
    names+="$name "
    NUM_RANKS=$((NUM_RANKS + BASH_REMATCH[2]))
  done <"$1"
  ((NUM_RANKS > 0)) || fail "HOSTFILE $1 names no node; write a line 'NAME slots=GPUS' for each."
}
[[ -z "$HOSTFILE" ]] || count_slots "$HOSTFILE"
[[ "$LAUNCHER" != accelerate ]] || ((NUM_RANKS > 1)) ||
  fail "LAUNCHER is accelerate, which starts no single process for DeepSpeed; use deepspeed or torchrun."

choose_port() { # the port asked for if it is free, any free one if none is asked for; on several nodes not looked at
  if [[ -n "$HOSTFILE" ]] || ((NUM_NODES > 1)); then
    echo "${MASTER_PORT:-29500}"
    return
  fi
  "$PYTHON" - "${MASTER_PORT:-0}" <<'PY' || fail "MASTER_PORT ${MASTER_PORT:-} is in use; choose another, or unset it."
import socket, sys
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port closed just now is free
    try:
        probe.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
    print(probe.getsockname()[1])
PY
}

launch() { # port, program, flags...
  local port="$1" command=()
  shift
  case "$LAUNCHER" in
    deepspeed)
      if [[ -n "$HOSTFILE" ]]; then
        command=(deepspeed --hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
      else
        command=(deepspeed --num_gpus "$NUM_RANKS")
      fi
      command+=(--master_port "$port") ;;
    torchrun)
      command=(torchrun --nproc_per_node "$RANKS_PER_NODE" --nnodes "$NUM_NODES" --node_rank "$NODE_RANK"
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$port") ;;
    accelerate) # --multi_gpu is its name for several processes, on CPUs too; what it would ask config files is given
      command=(accelerate launch --multi_gpu --gpu_ids all --mixed_precision no --dynamo_backend no
        --num_processes "$NUM_RANKS" --num_machines "$NUM_NODES" --machine_rank "$NODE_RANK"
        --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "$port") ;;
  esac
  run "${command[@]}" "$@"
}

wait_for_node_0() { # file
  local seconds=0
  [[ -z "${DRY_RUN:-}" ]] || return 0
  until ((NODE_RANK == 0 || seconds == 600)) || [[ -e "$1" ]]; do
    sleep 1
    seconds=$((seconds + 1))
  done
}
