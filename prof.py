import sys,time,torch
from dmllm.config import load_config
from dmllm.training.config import TrainConfig
from dmllm.training.assemble import assemble
from dmllm.training import loop
from dmllm.objectives.draws import Draws
c=load_config(TrainConfig,"data_configs/dmllm_tiny.yaml",["--output_dir=/tmp/prof","--steps=1000","--num_workers=14"])
run=assemble(c); it=loop.training_batches(run,0)
for s in range(8): loop.training_step(run,it,s)
torch.cuda.synchronize(); 
t=time.time()
for s in range(8,28): loop.training_step(run,it,s)
torch.cuda.synchronize(); print("step ms",(time.time()-t)/20*1e3)
t=time.time(); bs=[next(it) for _ in range(20)]; print("loader ms",(time.time()-t)/20*1e3, bs[0].input_ids.shape)
t=time.time(); ns=[run.objective.prepare(b,Draws(seed=0,step=0,num_examples=256,indices=b.indices)) for b in bs]; print("prepare ms",(time.time()-t)/20*1e3, ns[0].batch.input_ids.shape, ns[0].rows.shape)
ib=iter(bs+bs)
torch.cuda.synchronize(); t=time.time()
for s in range(20): loop.training_step(run,ib,s)
torch.cuda.synchronize(); print("step without loader ms",(time.time()-t)/20*1e3)
from torch.profiler import profile,ProfilerActivity
ib=iter(bs)
with profile(activities=[ProfilerActivity.CPU,ProfilerActivity.CUDA]) as p:
    for s in range(3): loop.training_step(run,ib,s)
    torch.cuda.synchronize()
print(p.key_averages().table(sort_by="cuda_time_total",row_limit=25,max_name_column_width=50)[:6000])
