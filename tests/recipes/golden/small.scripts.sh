#!/bin/bash
# sousbatch @VERSION@: run '1a6d885220d8', stage train
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/1a6d885220d8/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/1a6d885220d8 train

#!/bin/bash
# sousbatch @VERSION@: run '1a6d885220d8', stage consolidate
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/1a6d885220d8/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/1a6d885220d8 consolidate

#!/bin/bash
# sousbatch @VERSION@: run '1a6d885220d8', stage predict
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/1a6d885220d8/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/1a6d885220d8 predict

#!/bin/bash
# sousbatch @VERSION@: run '1a6d885220d8', stage merge
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/1a6d885220d8/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/1a6d885220d8 merge

#!/bin/bash
# sousbatch @VERSION@: run '1a6d885220d8', stage score
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/1a6d885220d8/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/1a6d885220d8 score
