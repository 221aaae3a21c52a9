#!/bin/bash
# sousbatch @VERSION@: run 'fec5ef7e59ca', stage train
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/fec5ef7e59ca/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/fec5ef7e59ca train

#!/bin/bash
# sousbatch @VERSION@: run 'fec5ef7e59ca', stage consolidate
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/fec5ef7e59ca/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/fec5ef7e59ca consolidate

#!/bin/bash
# sousbatch @VERSION@: run 'fec5ef7e59ca', stage predict
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/fec5ef7e59ca/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/fec5ef7e59ca predict

#!/bin/bash
# sousbatch @VERSION@: run 'fec5ef7e59ca', stage merge
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/fec5ef7e59ca/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/fec5ef7e59ca merge

#!/bin/bash
# sousbatch @VERSION@: run 'fec5ef7e59ca', stage score
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/fec5ef7e59ca/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage_process /runs/small/fec5ef7e59ca score
