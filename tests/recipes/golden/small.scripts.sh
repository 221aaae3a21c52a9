#!/bin/bash
# sousbatch @VERSION@: run '4bec9dc394b7', stage train
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/4bec9dc394b7/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/4bec9dc394b7 train

#!/bin/bash
# sousbatch @VERSION@: run '4bec9dc394b7', stage consolidate
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/4bec9dc394b7/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/4bec9dc394b7 consolidate

#!/bin/bash
# sousbatch @VERSION@: run '4bec9dc394b7', stage predict
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/4bec9dc394b7/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/4bec9dc394b7 predict

#!/bin/bash
# sousbatch @VERSION@: run '4bec9dc394b7', stage merge
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/4bec9dc394b7/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/4bec9dc394b7 merge

#!/bin/bash
# sousbatch @VERSION@: run '4bec9dc394b7', stage score
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/4bec9dc394b7/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/4bec9dc394b7 score
