"""Words that manifests have in common: the dictionary of their compression, part of the format.

What is most frequent stands last, where references to it are shortest.
"""

WORDS = (
    b'"conv1.weight","layer1.0.conv1.weight","layer1.0.conv2.weight","stage1.0.conv1.weight","features.0.weight",'
    b'"fc.weight","classifier.weight","encoder.layer.0.attention.self.query.weight",'
    b'"model.layers.0.self_attn.q_proj.weight"],"modules":["bn1","layer1.0.bn1","layer1.0.bn2"],'
    b'"shapes":[[[16],[16],[16],[16],[]],[[32],[32],[32],[32],[]],[[64],[64],[64],[64],[]],[[10]]]'
    b'"metadata":{"network":{"name":null,"options":{"in_channels":1}},"recipe":{"data":{"name":"fashion_mnist",'
    b'"batch_size":128,"validation":5000},"baseline":{"epochs":30},"compression":{"epochs":4,'
    b'"allocation":"rate_distortion","target_ratio":32.0,"num_components":8,"prior":{"kind":"learned"},'
    b'"learning_rate":0.05,"layout":"adaptive","leftover_dtype":"fixed8","distillation":{},"seed":0},'
    b'"metrics":{"accuracy":0.93,"nll":0.17,"ece":0.01},"posterior_widths":0.012'
    b'{"tensors":{"name":[],"shape":[[16,1,3,3],[16,16,3,3],[32,16,3,3],[32,32,3,3],[64,32,3,3],[64,64,3,3],[10,64]],'
    b'"layout":["entropy","entropy","dense","bitmap","adaptive","adaptive"],"bits":[0,0,0,0],"nonzeros":[],'
    b'"groups":[1,1,1,1],"components":[8,8,8,8],"codebook":["float16","float16"],'
    b'"lengths":[{"codebook":16,"table":9,"codes":16},{"codebook":16,"codes":],"crc32":[],'
    b'"leftovers":[{"fields":[{"name":"weight","dtype":"float16","bits":8},{"name":"bias","dtype":"float16","bits":8},'
    b'{"name":"running_mean","dtype":"float16","constant":"0000"},'
    b'{"name":"running_var","dtype":"float16","constant":"003c"},'
    b'{"name":"num_batches_tracked","dtype":"int64","constant":"'
)
