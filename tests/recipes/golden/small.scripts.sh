#!/bin/bash
# sousbatch @VERSION@: run 'e263e9febb0a', stage train
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/e263e9febb0a/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage /runs/small/e263e9febb0a train

#!/bin/bash
# sousbatch @VERSION@: run 'e263e9febb0a', stage consolidate
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/e263e9febb0a/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage /runs/small/e263e9febb0a consolidate

#!/bin/bash
# sousbatch @VERSION@: run 'e263e9febb0a', stage predict
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/e263e9febb0a/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage /runs/small/e263e9febb0a predict

#!/bin/bash
# sousbatch @VERSION@: run 'e263e9febb0a', stage merge
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/e263e9febb0a/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage /runs/small/e263e9febb0a merge

#!/bin/bash
# sousbatch @VERSION@: run 'e263e9febb0a', stage score
export HF_HUB_OFFLINE=1
export NCCL_DEBUG='it'"'"'s fine'
export OMP_NUM_THREADS=1
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=/runs/small/e263e9febb0a/code/mine${PYTHONPATH:+:$PYTHONPATH}
module load cuda
exec /opt/python -m sousbatch.launchers.stage /runs/small/e263e9febb0a score
