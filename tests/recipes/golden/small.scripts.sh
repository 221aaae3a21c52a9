#!/bin/bash
# sousbatch @VERSION@: run 'cc8dbb14d091', stage train
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/cc8dbb14d091/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/cc8dbb14d091 train

#!/bin/bash
# sousbatch @VERSION@: run 'cc8dbb14d091', stage consolidate
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/cc8dbb14d091/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/cc8dbb14d091 consolidate

#!/bin/bash
# sousbatch @VERSION@: run 'cc8dbb14d091', stage predict
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/cc8dbb14d091/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/cc8dbb14d091 predict

#!/bin/bash
# sousbatch @VERSION@: run 'cc8dbb14d091', stage merge
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/cc8dbb14d091/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/cc8dbb14d091 merge

#!/bin/bash
# sousbatch @VERSION@: run 'cc8dbb14d091', stage score
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/cc8dbb14d091/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/cc8dbb14d091 score
