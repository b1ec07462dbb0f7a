BEGIN TRANSACTION;
CREATE TABLE adaptations (
	adaptation_id VARCHAR(128) NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	state VARCHAR(32) NOT NULL, 
	adaptation JSON NOT NULL, 
	CONSTRAINT pk_adaptations PRIMARY KEY (adaptation_id), 
	CONSTRAINT fk_adaptations_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id), 
	CONSTRAINT ck_adaptations_state CHECK (state IN ('ordered', 'delivered', 'training', 'fossilized', 'culled', 'missed', 'failed', 'vetoed', 'stale'))
);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0003');
CREATE TABLE blueprints (
	name VARCHAR(512) NOT NULL, 
	version INTEGER NOT NULL, 
	blueprint JSON NOT NULL, 
	CONSTRAINT pk_blueprints PRIMARY KEY (name, version)
);
CREATE TABLE builds (
	adaptation_id VARCHAR(128) NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	kernel VARCHAR(71) NOT NULL, 
	CONSTRAINT pk_builds PRIMARY KEY (adaptation_id), 
	CONSTRAINT fk_builds_kernel_kernels FOREIGN KEY(kernel) REFERENCES kernels (digest), 
	CONSTRAINT fk_builds_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
CREATE TABLE decisions (
	run_id VARCHAR(64) NOT NULL, 
	epoch BIGINT NOT NULL, 
	decision JSON NOT NULL, 
	CONSTRAINT pk_decisions PRIMARY KEY (run_id, epoch), 
	CONSTRAINT fk_decisions_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "decisions" VALUES('run',1,'{"run_id": "run", "epoch": 1, "policy": "golden", "kind": "germinate", "code": "grow", "reason": "golden", "site": null, "seed": null, "blueprint": null, "hyperparameters": {}, "contract": null, "alternatives": [], "features": {}, "thresholds": {}}');
CREATE TABLE divergences (
	run_id VARCHAR(64) NOT NULL, 
	record VARCHAR(32) NOT NULL, 
	"key" VARCHAR(128) NOT NULL, 
	digest VARCHAR(71) NOT NULL, 
	second JSON NOT NULL, 
	CONSTRAINT pk_divergences PRIMARY KEY (run_id, record, "key", digest), 
	CONSTRAINT fk_divergences_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
CREATE TABLE "facts" (
	run_id VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	adaptation_id VARCHAR(128) NOT NULL, 
	kind VARCHAR(32) NOT NULL, 
	decides VARCHAR(32) NOT NULL, 
	apply_step BIGINT NOT NULL, 
	fact JSON NOT NULL, 
	CONSTRAINT pk_facts PRIMARY KEY (run_id, seq), 
	CONSTRAINT fk_facts_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id), 
	CONSTRAINT uq_facts_run_id UNIQUE (run_id, adaptation_id, decides), 
	CONSTRAINT ck_facts_kind CHECK (kind IN ('graft', 'missed', 'fossilize', 'cull', 'remove', 'strike', 'breaker', 'quarantine', 'stop'))
);
INSERT INTO "facts" VALUES('run',1,'run/a1','graft','graft',14,'{"run_id": "run", "adaptation_id": "run/a1", "kind": "graft", "apply_step": 14, "seq": 1, "site": "first", "seed": 0, "delivery": {"delivery_id": "sha256:ea06cb16b427fa31f02cfa667ea43fcb8ade8a1c7d0010b9590e4cb26228236e", "adaptation": {"adaptation_id": "run/a1", "number": 1, "site": "first", "seed": 0, "seed_generation": 0, "blueprint": "bottleneck", "hyperparameters": {"rank": 4}, "decided_epoch": 1, "apply_step": 14}, "kernel": "sha256:cfe10b60d451f891fb97e67a5be425744ee85ed87eb0a6bde21a53fbde726a0f", "manifest": {"digest": "sha256:cfe10b60d451f891fb97e67a5be425744ee85ed87eb0a6bde21a53fbde726a0f", "size_bytes": 1207}, "weights": {"digest": "sha256:012e2a269ca88ced5b65e983cbbdf67f0eca1e072607dd21e0b7f3b115da54e6", "size_bytes": 544}, "certificate": {"digest": "sha256:e42e292fb5b58fa1c495f2a1b3a2bbbc670f358bd726dcbab43019c48bf1266a", "size_bytes": 740}}, "judge_step": 28, "reason": ""}');
CREATE TABLE heads (
	run_id VARCHAR(64) NOT NULL, 
	digest VARCHAR(71) NOT NULL, 
	number INTEGER NOT NULL, 
	parent VARCHAR(71), 
	step BIGINT NOT NULL, 
	epoch BIGINT NOT NULL, 
	manifest_bytes BIGINT NOT NULL, 
	lease_gen BIGINT NOT NULL, 
	CONSTRAINT pk_heads PRIMARY KEY (run_id, digest), 
	CONSTRAINT fk_heads_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id), 
	CONSTRAINT uq_heads_run_id UNIQUE (run_id, number)
);
INSERT INTO "heads" VALUES('run','sha256:19a27c5398a8ed3901e4cceed47609410e29729b6ac2efb4c3e81add2055e76f',1,NULL,0,0,6629,1);
INSERT INTO "heads" VALUES('run','sha256:79006915cd77fc8afd6c0edb199dacb593afd29174d8fa04b0fbde4ec4e8cb52',2,'sha256:19a27c5398a8ed3901e4cceed47609410e29729b6ac2efb4c3e81add2055e76f',7,1,6647,1);
INSERT INTO "heads" VALUES('run','sha256:417cbd4e0702e4df68552e5febddc23c98fe64e12dcb4c872d65f55ed0f8ffb9',3,'sha256:79006915cd77fc8afd6c0edb199dacb593afd29174d8fa04b0fbde4ec4e8cb52',14,2,6648,1);
INSERT INTO "heads" VALUES('run','sha256:e020fd526dba3b716c555a85730b5ecb9270aa5fd2815f641002be9a5f3eac2e',4,'sha256:417cbd4e0702e4df68552e5febddc23c98fe64e12dcb4c872d65f55ed0f8ffb9',21,3,10323,1);
CREATE TABLE histories (
	run_id VARCHAR(64) NOT NULL, 
	workflow_id VARCHAR(512) NOT NULL, 
	temporal_run_id VARCHAR(64) NOT NULL, 
	sequence INTEGER NOT NULL, 
	digest VARCHAR(71) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	CONSTRAINT pk_histories PRIMARY KEY (run_id, workflow_id, temporal_run_id), 
	CONSTRAINT fk_histories_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
CREATE TABLE judgements (
	adaptation_id VARCHAR(128) NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	verdict VARCHAR(32) NOT NULL, 
	report JSON NOT NULL, 
	CONSTRAINT pk_judgements PRIMARY KEY (adaptation_id), 
	CONSTRAINT fk_judgements_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id), 
	CONSTRAINT ck_judgements_verdict CHECK (verdict IN ('keep', 'cull', 'void'))
);
CREATE TABLE kernels (
	number INTEGER NOT NULL, 
	digest VARCHAR(71) NOT NULL, 
	blueprint VARCHAR(512) NOT NULL, 
	state VARCHAR(32) NOT NULL, 
	kernel JSON NOT NULL, 
	CONSTRAINT pk_kernels PRIMARY KEY (number), 
	CONSTRAINT uq_kernels_digest UNIQUE (digest), 
	CONSTRAINT ck_kernels_state CHECK (state IN ('built', 'certified', 'rejected', 'quarantined'))
);
CREATE TABLE markers (
	run_id VARCHAR(64) NOT NULL, 
	adaptation_id VARCHAR(128) NOT NULL, 
	kernel VARCHAR(71) NOT NULL, 
	opened BIGINT, 
	crashes INTEGER NOT NULL, 
	CONSTRAINT pk_markers PRIMARY KEY (run_id, adaptation_id), 
	CONSTRAINT fk_markers_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "markers" VALUES('run','run/a1','sha256:cfe10b60d451f891fb97e67a5be425744ee85ed87eb0a6bde21a53fbde726a0f',NULL,0);
CREATE TABLE reports (
	run_id VARCHAR(64) NOT NULL, 
	epoch BIGINT NOT NULL, 
	step BIGINT NOT NULL, 
	report JSON NOT NULL, 
	CONSTRAINT pk_reports PRIMARY KEY (run_id, epoch), 
	CONSTRAINT fk_reports_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
INSERT INTO "reports" VALUES('run',1,7,'{"run_id": "run", "epoch": 1, "step": 7, "head": {"digest": "sha256:79006915cd77fc8afd6c0edb199dacb593afd29174d8fa04b0fbde4ec4e8cb52", "parent": "sha256:19a27c5398a8ed3901e4cceed47609410e29729b6ac2efb4c3e81add2055e76f", "step": 7, "epoch": 1}, "metrics": {"train_loss": 1.1434611225128173, "val_loss": 1.1089172274978072, "extra": {"accuracy": 0.3148148148148148}}, "learning_rate": 0.009931806517013612, "samples": 200, "parameters": 219, "training_flops": 182400.0, "probe_flops": 182400.0, "busy_seconds": 0.07565597999928286, "stall_seconds": 2.8632999601541087e-05, "graph": {"nodes": [{"contract": {"site": "first", "output_site": "first", "kind": "linear", "input_shape": [12], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"in_features": 12, "out_features": 8, "bias": true, "channel_axis": "last", "pair_activation": "relu", "pair_between": [{"op": "batch_norm", "eps": 1e-05, "momentum": 0.1, "affine": true, "track_running_stats": true}, {"op": "activation", "name": "relu"}], "pair_norms": ["norm"]}}, "parameter_count": 104, "flops_per_sample": 192, "depth": 0, "widen_output": "second", "seeds": [{"site": "first", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "norm", "output_site": "norm", "kind": "batch_norm", "input_shape": [8], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"num_features": 8, "eps": 1e-05, "momentum": 0.1, "affine": true, "track_running_stats": true, "channel_axis": "first"}}, "parameter_count": 16, "flops_per_sample": 0, "depth": 1, "widen_output": null, "seeds": [{"site": "norm", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "second", "output_site": "second", "kind": "linear", "input_shape": [8], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"in_features": 8, "out_features": 8, "bias": true, "channel_axis": "last", "pair_activation": "relu", "pair_between": [{"op": "activation", "name": "relu"}], "pair_norms": []}}, "parameter_count": 72, "flops_per_sample": 128, "depth": 2, "widen_output": "last", "seeds": [{"site": "second", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "last", "output_site": "last", "kind": "linear", "input_shape": [8], "output_shape": [3], "dtype": "float32", "reads": "input", "attributes": {"in_features": 8, "out_features": 3, "bias": true, "channel_axis": "last"}}, "parameter_count": 27, "flops_per_sample": 48, "depth": 3, "widen_output": null, "seeds": [{"site": "last", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}], "edges": [{"source": "first", "target": "norm", "elements": 8}, {"source": "norm", "target": "second", "elements": 8}, {"source": "second", "target": "last", "elements": 8}]}, "health": [{"site": "first", "seed": 0, "epoch": 1, "step": 7, "rows_seen": 200, "activation_mean": -0.024853688144357875, "activation_variance": 0.34968481153471553, "dead_neuron_ratio": 0.0, "average_correlation": -0.047700939759946666, "gradient_norm": 0.10530216991901398, "error_count": 0, "is_ready_for_transition": false, "saturation": 0.907404836407577, "residual_gradient": 0.831455976032866, "residual_gradient_norm": 0.01735633072921926, "gradient_to_weight": 0.059847751281643206, "update_to_weight": 0.02718895645754634, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": 0.0075892385840541825}, {"site": "norm", "seed": 0, "epoch": 1, "step": 7, "rows_seen": 200, "activation_mean": 0.015393581868538604, "activation_variance": 1.0276649649188878, "dead_neuron_ratio": 0.0, "average_correlation": -0.047700939615652915, "gradient_norm": 0.03735792264342308, "error_count": 0, "is_ready_for_transition": false, "saturation": 0.9106932035125952, "residual_gradient": 0.8577392605394022, "residual_gradient_norm": 0.009902915527208974, "gradient_to_weight": 0.013027318072265516, "update_to_weight": 0.007449804251726464, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}, {"site": "second", "seed": 0, "epoch": 1, "step": 7, "rows_seen": 200, "activation_mean": -0.018058021948672832, "activation_variance": 0.22224458495916483, "dead_neuron_ratio": 0.0, "average_correlation": -0.04699758458606053, "gradient_norm": 0.14816899597644806, "error_count": 0, "is_ready_for_transition": false, "saturation": 0.7534814560079677, "residual_gradient": 0.810888600147084, "residual_gradient_norm": 0.02244851734315208, "gradient_to_weight": 0.0833917795603891, "update_to_weight": 0.025274704373803678, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": 0.01877667540807251}, {"site": "last", "seed": 0, "epoch": 1, "step": 7, "rows_seen": 200, "activation_mean": 0.19886532742530108, "activation_variance": 0.0491188395649947, "dead_neuron_ratio": 0.0, "average_correlation": -0.24756261861728135, "gradient_norm": 0.29492926597595215, "error_count": 0, "is_ready_for_transition": false, "saturation": 0.7893057488377191, "residual_gradient": 0.7405309484461973, "residual_gradient_norm": 0.04905288254756761, "gradient_to_weight": 0.26275082466540783, "update_to_weight": 0.030035722647374134, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": 0.026641503989693255}], "site_samples": {"digest": "sha256:d29d56dc1bc9b875bd5ea46b21abbf7b9486fb8a48028d227966f8f64448b5d7", "size_bytes": 50976}, "held_adaptation": null, "facts": [], "stop": false}');
INSERT INTO "reports" VALUES('run',2,14,'{"run_id": "run", "epoch": 2, "step": 14, "head": {"digest": "sha256:417cbd4e0702e4df68552e5febddc23c98fe64e12dcb4c872d65f55ed0f8ffb9", "parent": "sha256:79006915cd77fc8afd6c0edb199dacb593afd29174d8fa04b0fbde4ec4e8cb52", "step": 14, "epoch": 2}, "metrics": {"train_loss": 1.046235122680664, "val_loss": 0.9996882323865537, "extra": {"accuracy": 0.6111111111111112}}, "learning_rate": 0.008678619553365659, "samples": 200, "parameters": 219, "training_flops": 182400.0, "probe_flops": 0.0, "busy_seconds": 0.028422537998267217, "stall_seconds": 3.608400220400654e-05, "graph": {"nodes": [{"contract": {"site": "first", "output_site": "first", "kind": "linear", "input_shape": [12], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"in_features": 12, "out_features": 8, "bias": true, "channel_axis": "last", "pair_activation": "relu", "pair_between": [{"op": "batch_norm", "eps": 1e-05, "momentum": 0.1, "affine": true, "track_running_stats": true}, {"op": "activation", "name": "relu"}], "pair_norms": ["norm"]}}, "parameter_count": 104, "flops_per_sample": 192, "depth": 0, "widen_output": "second", "seeds": [{"site": "first", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "norm", "output_site": "norm", "kind": "batch_norm", "input_shape": [8], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"num_features": 8, "eps": 1e-05, "momentum": 0.1, "affine": true, "track_running_stats": true, "channel_axis": "first"}}, "parameter_count": 16, "flops_per_sample": 0, "depth": 1, "widen_output": null, "seeds": [{"site": "norm", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "second", "output_site": "second", "kind": "linear", "input_shape": [8], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"in_features": 8, "out_features": 8, "bias": true, "channel_axis": "last", "pair_activation": "relu", "pair_between": [{"op": "activation", "name": "relu"}], "pair_norms": []}}, "parameter_count": 72, "flops_per_sample": 128, "depth": 2, "widen_output": "last", "seeds": [{"site": "second", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "last", "output_site": "last", "kind": "linear", "input_shape": [8], "output_shape": [3], "dtype": "float32", "reads": "input", "attributes": {"in_features": 8, "out_features": 3, "bias": true, "channel_axis": "last"}}, "parameter_count": 27, "flops_per_sample": 48, "depth": 3, "widen_output": null, "seeds": [{"site": "last", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}], "edges": [{"source": "first", "target": "norm", "elements": 8}, {"source": "norm", "target": "second", "elements": 8}, {"source": "second", "target": "last", "elements": 8}]}, "health": [{"site": "first", "seed": 0, "epoch": 2, "step": 14, "rows_seen": 8, "activation_mean": -0.047602154314517975, "activation_variance": 0.4100242555141449, "dead_neuron_ratio": 0.25, "average_correlation": null, "gradient_norm": 0.5199804902076728, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.2920717491995421, "update_to_weight": 0.02041765092877839, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}, {"site": "norm", "seed": 0, "epoch": 2, "step": 14, "rows_seen": 8, "activation_mean": 0.039261478930711746, "activation_variance": 1.0750036239624023, "dead_neuron_ratio": 0.0, "average_correlation": null, "gradient_norm": 0.11220015735277207, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.03823091556929008, "update_to_weight": 0.007242907556238329, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}, {"site": "second", "seed": 0, "epoch": 2, "step": 14, "rows_seen": 8, "activation_mean": 0.06361056864261627, "activation_variance": 0.30555009841918945, "dead_neuron_ratio": 0.125, "average_correlation": null, "gradient_norm": 0.35158215269805493, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.1947514173857977, "update_to_weight": 0.02052424616432546, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}, {"site": "last", "seed": 0, "epoch": 2, "step": 14, "rows_seen": 8, "activation_mean": 0.27275025844573975, "activation_variance": 0.11099698394536972, "dead_neuron_ratio": 0.0, "average_correlation": null, "gradient_norm": 0.6308242483731953, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.5376027747112847, "update_to_weight": 0.023501090929487718, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}], "site_samples": null, "held_adaptation": null, "facts": [], "stop": false}');
INSERT INTO "reports" VALUES('run',3,21,'{"run_id": "run", "epoch": 3, "step": 21, "head": {"digest": "sha256:e020fd526dba3b716c555a85730b5ecb9270aa5fd2815f641002be9a5f3eac2e", "parent": "sha256:417cbd4e0702e4df68552e5febddc23c98fe64e12dcb4c872d65f55ed0f8ffb9", "step": 21, "epoch": 3}, "metrics": {"train_loss": 0.9261374878883362, "val_loss": 0.9013273738048695, "extra": {"accuracy": 0.6666666666666666}}, "learning_rate": 0.006227427435703996, "samples": 200, "parameters": 303, "training_flops": 259200.0, "probe_flops": 103072.0, "busy_seconds": 0.14267640200341702, "stall_seconds": 4.033099685329944e-05, "graph": {"nodes": [{"contract": {"site": "first", "output_site": "first", "kind": "linear", "input_shape": [12], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"in_features": 12, "out_features": 8, "bias": true, "channel_axis": "last", "pair_activation": "relu", "pair_between": [{"op": "batch_norm", "eps": 1e-05, "momentum": 0.1, "affine": true, "track_running_stats": true}, {"op": "activation", "name": "relu"}], "pair_norms": ["norm"]}}, "parameter_count": 104, "flops_per_sample": 192, "depth": 0, "widen_output": "second", "seeds": [{"site": "first", "index": 0, "generation": 0, "state": "training", "blueprint": "bottleneck", "kernel": "sha256:cfe10b60d451f891fb97e67a5be425744ee85ed87eb0a6bde21a53fbde726a0f", "adaptation_id": "run/a1", "parameters": 84, "born_step": 14}, {"site": "first", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "first", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "norm", "output_site": "norm", "kind": "batch_norm", "input_shape": [8], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"num_features": 8, "eps": 1e-05, "momentum": 0.1, "affine": true, "track_running_stats": true, "channel_axis": "first"}}, "parameter_count": 16, "flops_per_sample": 0, "depth": 1, "widen_output": null, "seeds": [{"site": "norm", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "norm", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "second", "output_site": "second", "kind": "linear", "input_shape": [8], "output_shape": [8], "dtype": "float32", "reads": "input", "attributes": {"in_features": 8, "out_features": 8, "bias": true, "channel_axis": "last", "pair_activation": "relu", "pair_between": [{"op": "activation", "name": "relu"}], "pair_norms": []}}, "parameter_count": 72, "flops_per_sample": 128, "depth": 2, "widen_output": "last", "seeds": [{"site": "second", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "second", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}, {"contract": {"site": "last", "output_site": "last", "kind": "linear", "input_shape": [8], "output_shape": [3], "dtype": "float32", "reads": "input", "attributes": {"in_features": 8, "out_features": 3, "bias": true, "channel_axis": "last"}}, "parameter_count": 27, "flops_per_sample": 48, "depth": 3, "widen_output": null, "seeds": [{"site": "last", "index": 0, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 1, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 2, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}, {"site": "last", "index": 3, "generation": 0, "state": "dormant", "blueprint": null, "kernel": null, "adaptation_id": null, "parameters": 0, "born_step": null}]}], "edges": [{"source": "first", "target": "norm", "elements": 8}, {"source": "norm", "target": "second", "elements": 8}, {"source": "second", "target": "last", "elements": 8}]}, "health": [{"site": "first", "seed": 0, "epoch": 3, "step": 21, "rows_seen": 8, "activation_mean": -0.05660988390445709, "activation_variance": 0.4167671799659729, "dead_neuron_ratio": 0.0, "average_correlation": null, "gradient_norm": 0.35938644409179693, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.1987743463818875, "update_to_weight": 0.013707022057471116, "newborn_to_incumbent_gradient": 0.21721282025064392, "gradient_signal_to_noise": null}, {"site": "norm", "seed": 0, "epoch": 3, "step": 21, "rows_seen": 8, "activation_mean": 0.06555718183517456, "activation_variance": 1.1409194469451904, "dead_neuron_ratio": 0.0, "average_correlation": null, "gradient_norm": 0.11346625952355165, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.0374861868257437, "update_to_weight": 0.004824061999904653, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}, {"site": "second", "seed": 0, "epoch": 3, "step": 21, "rows_seen": 8, "activation_mean": 0.14768561720848083, "activation_variance": 0.33811986446380615, "dead_neuron_ratio": 0.0, "average_correlation": null, "gradient_norm": 0.5013455319747059, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.26890120207506224, "update_to_weight": 0.01675008126040876, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}, {"site": "last", "seed": 0, "epoch": 3, "step": 21, "rows_seen": 8, "activation_mean": 0.3258952498435974, "activation_variance": 0.26663053035736084, "dead_neuron_ratio": 0.0, "average_correlation": null, "gradient_norm": 0.5227285036614223, "error_count": 0, "is_ready_for_transition": false, "saturation": null, "residual_gradient": null, "residual_gradient_norm": null, "gradient_to_weight": 0.41290314633076125, "update_to_weight": 0.015088351595795357, "newborn_to_incumbent_gradient": null, "gradient_signal_to_noise": null}], "site_samples": null, "held_adaptation": "run/a1", "facts": [{"run_id": "run", "adaptation_id": "run/a1", "kind": "graft", "apply_step": 14, "seq": 1, "site": "first", "seed": 0, "delivery": {"delivery_id": "sha256:ea06cb16b427fa31f02cfa667ea43fcb8ade8a1c7d0010b9590e4cb26228236e", "adaptation": {"adaptation_id": "run/a1", "number": 1, "site": "first", "seed": 0, "seed_generation": 0, "blueprint": "bottleneck", "hyperparameters": {"rank": 4}, "decided_epoch": 1, "apply_step": 14}, "kernel": "sha256:cfe10b60d451f891fb97e67a5be425744ee85ed87eb0a6bde21a53fbde726a0f", "manifest": {"digest": "sha256:cfe10b60d451f891fb97e67a5be425744ee85ed87eb0a6bde21a53fbde726a0f", "size_bytes": 1207}, "weights": {"digest": "sha256:012e2a269ca88ced5b65e983cbbdf67f0eca1e072607dd21e0b7f3b115da54e6", "size_bytes": 544}, "certificate": {"digest": "sha256:e42e292fb5b58fa1c495f2a1b3a2bbbc670f358bd726dcbab43019c48bf1266a", "size_bytes": 740}}, "judge_step": 28, "reason": ""}], "stop": false}');
CREATE TABLE rewinds (
	run_id VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	from_head VARCHAR(71) NOT NULL, 
	to_head VARCHAR(71) NOT NULL, 
	lease_gen BIGINT NOT NULL, 
	reason TEXT NOT NULL, 
	CONSTRAINT pk_rewinds PRIMARY KEY (run_id, number), 
	CONSTRAINT fk_rewinds_run_id_runs FOREIGN KEY(run_id) REFERENCES runs (run_id)
);
CREATE TABLE runs (
	number INTEGER NOT NULL, 
	run_id VARCHAR(64) NOT NULL, 
	config JSON NOT NULL, 
	outcome VARCHAR(32) NOT NULL, 
	created VARCHAR(64) NOT NULL, 
	lease_gen BIGINT DEFAULT '0' NOT NULL, 
	task_queue TEXT, 
	head VARCHAR(71), 
	device TEXT, 
	threads INTEGER, 
	parameters_start BIGINT, 
	finished JSON, 
	restarts INTEGER DEFAULT '0' NOT NULL, 
	warnings JSON NOT NULL, 
	failure JSON, lineage JSON, 
	CONSTRAINT pk_runs PRIMARY KEY (number), 
	CONSTRAINT uq_runs_run_id UNIQUE (run_id), 
	CONSTRAINT ck_runs_outcome CHECK (outcome IN ('running', 'paused', 'completed', 'stopped', 'failed'))
);
INSERT INTO "runs" VALUES(1,'run','{"run": {"name": "small", "seed": 3, "max_epochs": 6, "device": "cpu", "threads": 1}, "task": {"name": null, "target": "tolaria_tasks:small", "path": null, "arguments": {}}, "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.01, "momentum": 0.0, "schedule": {"name": "cosine", "warmup": 0.1}, "clip": 1.0}, "training": {"batch_size": 32, "early_stop": null, "checkpoint_every": {"epochs": 1}}, "kasmina": {"target_layers": "auto", "exclude": [], "seeds_per_layer": 4, "cache_size_mb": 128, "strikes": 3}, "delivery": {"mode": "scheduled", "lag_epochs": 1}, "tamiyo": {"policy": "heuristic", "adaptation_frequency": 1, "hold_epochs": 2, "hold_steps": 0, "max_adaptations": 6, "blueprints": ["bottleneck", "widen"], "keep_margin": 0.0}, "tezzeret": {"timeout_s": 20.0, "memory_mb": 2048, "max_parameters": 10000000, "max_flops": 100000000000, "compile": "auto"}, "urza": {"database": "default", "objects": "default"}, "temporal": {"address": "default", "namespace": "default"}}','running','2030-01-01T00:00:00Z',1,'queue','sha256:e020fd526dba3b716c555a85730b5ecb9270aa5fd2815f641002be9a5f3eac2e',NULL,NULL,NULL,NULL,0,'[]',NULL,NULL);
CREATE INDEX ix_adaptations_run_id ON adaptations (run_id);
CREATE INDEX ix_builds_kernel ON builds (kernel);
CREATE INDEX ix_builds_run_id ON builds (run_id);
CREATE INDEX ix_judgements_run_id ON judgements (run_id);
COMMIT;
