# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.docs-installed
# Tests run in as many processes, of one thread and up to 1.5 GB each: one a processor, but no more than 8.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
# What one process has compiled to bytecode the others read.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test kernels lint slow docs fuzz reliability sanitize gpu clean fashion-mnist foreign-text calibration-text

demo: $(STAMP)
	$(BIN)/sqs compress recipes/digits.yaml --out runs/demo --overwrite

# What the tests wait for is compiled while mypy, which has one core, looks at the types.
test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=$(WORKERS) lint kernels
	$(PYTEST) -m "not slow"

kernels: $(STAMP)
	$(BIN)/python -c "from sqs_pyro.kernels import native; [native.native_kernels(form) for form in native.SOURCES]"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The grid of products on CPU kernels that look for accesses out of bounds.
sanitize: $(STAMP)
	SQS_CACHE=build/sanitize SQS_CXXFLAGS="-march=native -O1 -g1 -fsanitize=address -fno-omit-frame-pointer" \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/python -m pytest tests/kernels/test_matrices.py tests/kernels/test_convolution.py tests/kernels/test_coding.py

# On a machine with a CUDA device, where torch sees it: correctness of every path, then speed beside what else there is.
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'torch sees no CUDA device'"
	$(PYTHON) -m pytest tests/kernels/gpu
	$(PYTHON) -m sqs_pyro bench kernels --device cuda --out benchmarks/kernels_gpu.json

# Damaged files of every kind that is read: CASES packed ones, a fifth of it of each other kind, the same every time.
CASES ?= 10000
fuzz: $(STAMP)
	mkdir -p build
	cd tests && OMP_NUM_THREADS=1 SQS_KERNELS=reference HF_HUB_OFFLINE=1 $(abspath $(BIN))/python -m fuzz --cases $(CASES) --out ../build/fuzz.json

# Small faults, put into copies of the library one after the other, that the fast tests must notice.
mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

# Runs that are killed at random moments, and disks that are full at ten: same bytes, nothing left over.
reliability: $(STAMP)
	$(BIN)/python tests/reliability/kill.py --count 100
	$(BIN)/python tests/reliability/full_disk.py --moments 10

slow: $(STAMP)
	$(PYTEST) -m slow

# The site, into build/site: a warning, a dead link or a missing anchor fails it. Nothing is imported, nothing fetched.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Fashion-MNIST for the recipes that use it: Debian's package, unpacked into data/ without root.
fashion-mnist: data/fashion-mnist/train-images-idx3-ubyte.gz
data/fashion-mnist/train-images-idx3-ubyte.gz:
	rm -rf data/.deb && mkdir -p data/.deb data/fashion-mnist
	cd data/.deb && apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb .
	mv data/.deb/usr/share/datasets/fashion-mnist/*.gz data/fashion-mnist/
	rm -rf data/.deb

# English of other kinds than Python's help, for the benchmarks of language models, from Debian: quotations and a
# lexicon of slang to judge by; essays and a dictionary of computing to calibrate on, too.
foreign-text: data/foreign.txt data/jargon.txt
calibration-text: data/essays.txt data/dictionary.txt
data/%.txt:
	rm -rf data/.deb && mkdir -p data/.deb
	cd data/.deb && apt-get download $(PACKAGE) && dpkg-deb -x *.deb .
	cd data/.deb/usr/share && $(TAKEN) > $(abspath data)/.part && mv $(abspath data)/.part $(abspath $@)
	rm -rf data/.deb
data/foreign.txt: PACKAGE = fortunes
data/foreign.txt: TAKEN = sed 's/^%$$//' games/fortunes/people
data/jargon.txt: PACKAGE = jargon-text
data/jargon.txt: TAKEN = zcat doc/jargon-text/jargon.txt.gz
data/essays.txt: PACKAGE = anarchism
data/essays.txt: TAKEN = zcat doc/anarchism/markdown/sec*.md.gz
data/dictionary.txt: PACKAGE = dict-foldoc
data/dictionary.txt: TAKEN = zcat -f dictd/foldoc.dict.dz

# Compiled on all cores (templates are no Python): what a test compiles may warn there, which is an error.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > $(VENV)/compileall.txt || true
	touch $@

$(DOCS): $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
