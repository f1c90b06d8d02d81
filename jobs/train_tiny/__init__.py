"""How b2batch/assets/baichuan2-tiny was made, from labelled reviews, on a CPU in minutes.

python -m jobs.train_tiny.train --data DIR --out DIR                 tokenizer, network, checkpoint
python -m jobs.train_tiny.evaluate --model DIR --reviews FILE ...    how often its answer is the label
python -m jobs.train_tiny.sample --reviews FILE --out FILE           the review sample beside the model

It is plain torch and imports nothing of b2batch: training needs dropout and averaged weights, and a
network written twice is a check on both.
"""
